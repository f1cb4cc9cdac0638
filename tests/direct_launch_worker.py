"""Launches attention twice on the same tensors, without a GPU: compares what Triton and we pass to the driver."""

import torch
from triton.runtime import driver

from benchmarks.static import CompileOnly
from mfengine import ops

METADATA = 6  # arguments before the kernel's: three sizes of the grid, stream, function, packed metadata


class Recording(CompileOnly):
    def __init__(self):
        super().__init__("direct", 90)
        self.launches = []

    def launcher_cls(self, source, metadata):
        return lambda *args: self.launches.append(args)


def main():
    recording = Recording()
    driver.set_active(recording)
    x, dx = (torch.empty(batch, 256, 3 * 2 * 72, dtype=torch.bfloat16) for batch in (3, 1))
    with ops.use_backend("triton"):
        kept = [ops.attention_packed(ops.Dual(x, dx), 2) for _ in range(2)]
    assert len(kept) == 2
    by_triton, by_us = recording.launches[:2], recording.launches[2:]  # first rows, last rows
    inputs = 0
    for theirs, ours in zip(by_triton, by_us, strict=True):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            if not isinstance(a, torch.Tensor):
                assert a == b or i == METADATA
            elif a.untyped_storage().data_ptr() in (x.data_ptr(), dx.data_ptr()):
                assert a.data_ptr() == b
                inputs += 1
            else:
                assert isinstance(b, int)  # outputs have new addresses each time
    print(f"{inputs} inputs alike")


if __name__ == "__main__":
    main()
