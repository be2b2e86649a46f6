"""Imported as distmoe.launch; the top-level name belongs to other packages."""

if __name__ != "distmoe.launch":
    raise ImportError(
        "import distmoe.launch: a bare 'launch' would load every module a second time"
    )
