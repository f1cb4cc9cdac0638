"""Sets of images on disk, as folders of PNG files or as ADM's .npz, read and written a few images at a time."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfengine.errors import InputError, RankError
from mfengine.files import check_writable, writing
from mfengine.ranks import World

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's names
ARRAY = "arr_0"  # the array's name in ADM's .npz files, and NumPy's default


def open_rgb(file: Path | IO[bytes]) -> Image.Image:
    """Decode an image to RGB, 8 bits a channel.

    The channel of grey images is repeated, transparency is dropped, CMYK and palettes are converted, and 16 bits are
    cut to their upper 8. EXIF orientation is ignored, as in ADM.

    Raises:
        Exception: the file is broken; Pillow raises many kinds. PIL.UnidentifiedImageError: its format is unknown.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


class ImageFolder:
    """Images of one size in a folder and its subfolders, in the order of their paths.

    Raises:
        InputError: there are no images, or the first one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise InputError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        self.height, self.width = _read_image(self._files[0], InputError).shape[:2]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: range) -> Tensor:
        """Images (n, 3, H, W) uint8; RankError if one is broken or differs in size from the first."""
        images = [_read_image(path, RankError) for path in self._files[rows.start : rows.stop]]
        for path, image in zip(self._files[rows.start : rows.stop], images, strict=True):
            if image.shape[:2] != (self.height, self.width):
                raise RankError(
                    f"{path} is {image.shape[1]} x {image.shape[0]}, but {self._files[0].name} is "
                    f"{self.width} x {self.height}: crop all images to one size first"
                )
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class ImageArchive:
    """The images of an .npz: an array (N, H, W, 3) uint8, never loaded as a whole.

    Raises:
        InputError: the array has another shape or type.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = zipfile.ZipFile(path).open(f"{ARRAY}.npy")  # noqa: SIM115, read until the end
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(self._file)]
        shape, column_major, dtype = read_header(self._file)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or column_major:
            raise InputError(f"{path}: {ARRAY} is {dtype} {shape}; images must be uint8 (N, H, W, 3)")
        self._count, self.height, self.width, _ = shape
        self._begin = self._file.tell()

    def __len__(self) -> int:
        return self._count

    def read(self, rows: range) -> Tensor:
        """Images (n, 3, H, W) uint8; fast if rows come in order."""
        size = self.height * self.width * 3
        try:
            self._file.seek(self._begin + rows.start * size)
            pixels = np.frombuffer(self._file.read(len(rows) * size), np.uint8).copy()
            images = torch.from_numpy(pixels.reshape(len(rows), self.height, self.width, 3))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise RankError(f"cannot read {self._path}: {error}") from None
        return images.permute(0, 3, 1, 2)


def _read_image(path: Path, kind: Callable[[str], InputError]) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        return np.asarray(open_rgb(path))
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise kind(f"cannot read {path}: {error}") from None


class ImageWriter:
    """Writes images from several ranks into one file or folder that all of them see. The last step names it.

    Args:
        path: NAME.npz for an array (N, H, W, 3) uint8 called arr_0, which ADM's evaluation reads; or a folder for
            000000.png and so on.
        count, height, width: number and size of the images.
        world: the ranks that write; every rank makes a writer.

    Raises:
        InputError: the file exists, the folder is not empty, or the place is not writable.
    """

    def __init__(self, path: Path, count: int, height: int, width: int, world: World) -> None:
        self._path, self._world = path, world
        self._partial = path.with_name(f".partial-{path.name}")
        self._size = height * width * 3
        self._array = self._partial / f"{ARRAY}.npy" if path.suffix == ".npz" else None
        check_new(path)

        def begin() -> int:
            """Number of bytes before the first image of the array."""
            with self._writing():
                if self._partial.exists():
                    shutil.rmtree(self._partial)  # left by a writer that was killed
                self._partial.mkdir(parents=True)
                if self._array is None:
                    return 0
                with self._array.open("wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
                    np.lib.format.write_array_header_1_0(file, header)
                    return file.tell()

        self._begin = world.on_main(begin)

    def write(self, rows: range, images: Tensor, names: Sequence[str] = ()) -> None:
        """Write images (n, 3, H, W) uint8 under the numbers `rows`; RankError if that fails.

        The name of a PNG file is its number, followed by its entry in `names`.
        """
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        with self._writing(RankError):
            if self._array is not None:
                # No memory maps: machines that share a page would overwrite each other's images in it.
                with self._array.open("r+b") as file:
                    file.seek(self._begin + rows.start * self._size)
                    file.write(pixels.tobytes())
            else:
                endings = [f"-{name}" for name in names] or [""] * len(rows)
                for i, ending, image in zip(rows, endings, pixels, strict=True):
                    Image.fromarray(image).save(self._partial / f"{i:06d}{ending}.png", compress_level=1)

    def finish(self) -> None:
        """Move the images to their final name; every rank calls it."""
        self._world.gather([0])  # waits until all ranks have written
        self._world.on_main(self._rename)

    def _rename(self) -> None:
        with self._writing():
            if self._array is not None:
                archive = self._partial / self._path.name
                with zipfile.ZipFile(archive, "w") as file:  # uncompressed, as by np.savez
                    file.write(self._array, self._array.name)
                archive.rename(self._path)
                shutil.rmtree(self._partial)
            else:
                if self._path.exists():
                    self._path.rmdir()
                self._partial.rename(self._path)

    @contextmanager
    def _writing(self, kind: Callable[[str], InputError] = InputError) -> Iterator[None]:
        """Like `writing`, but removes all images on failure."""
        try:
            with writing(self._path, kind):
                yield
        except InputError:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise


def check_new(path: Path) -> None:
    """InputError unless images can be written under this name: it must not exist, or be an empty folder."""
    if path.suffix == ".npz" and path.exists():
        raise InputError(f"{path} exists: choose another name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder: choose another one, or remove it first")
    check_writable(path)
