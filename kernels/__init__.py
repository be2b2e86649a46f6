"""Imported as distmoe.kernels; the top-level name belongs to other packages."""

if __name__ != "distmoe.kernels":
    raise ImportError(
        "import distmoe.kernels: a bare 'kernels' would load every module a second time"
    )
