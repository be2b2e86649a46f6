"""The roofline of an expert layer against figures worked out by hand."""

import pytest

from distmoe.planner.roofline import BACKWARD, FORWARD, LayerSize, floor_ms, layer_flops, layer_work

H100 = "NVIDIA H100 80GB HBM3"
# T, H, I, E, K -> floors of forward and backward in ms on an H100 (798 TFLOP/s, 3.0 TB/s).
KNOWN = {
    "7B": ((24576, 1536, 256, 128, 8), (0.882, 1.422)),
    "7B, E=32": ((24576, 1536, 1024, 32, 2), (0.657, 1.271)),
    "30B": ((32768, 4096, 256, 256, 16), (5.98, 9.79)),
    "README": ((32768, 4096, 1024, 128, 8), (9.07, 17.34)),
}


def size_of(T: int, H: int, I: int, E: int, K: int) -> LayerSize:
    return LayerSize(rows=T, pairs=T * K, experts=E, hidden=H, intermediate=I)


@pytest.mark.parametrize(("sizes", "expected"), KNOWN.values(), ids=KNOWN)
def test_floor(sizes: tuple[int, int, int, int, int], expected: tuple[float, float]) -> None:
    floors = floor_ms(size_of(*sizes), H100)
    assert floors["forward"] == pytest.approx(expected[0], rel=2e-3)
    assert floors["backward"] == pytest.approx(expected[1], rel=2e-3)
    assert floors["both"] == pytest.approx(floors["forward"] + floors["backward"])


def test_kernels_do_the_flops_of_the_layer() -> None:
    size = size_of(48, 64, 32, 4, 2)
    work, flops = layer_work(size), layer_flops(size.pairs, size.hidden, size.intermediate)
    assert sum(work[name].flops for name in FORWARD) == flops["forward"] == 6 * 96 * 64 * 32
    assert sum(work[name].flops for name in BACKWARD) == flops["backward"] == 12 * 96 * 64 * 32
    assert set(work) == {*FORWARD, *BACKWARD}


def test_unknown_device_has_no_floor() -> None:
    assert floor_ms(size_of(48, 64, 32, 4, 2), "a slide rule") == {}
