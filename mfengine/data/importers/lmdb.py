"""LMDBs of pickled dicts, written by PyTorch ports of MeanFlow (github.com/zhuyu-cs/MeanFlow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mfengine.data.importers.base import Importer, SampleError, float_array
from mfengine.data.sources.lmdb import lmdb_errors, open_lmdb
from mfengine.errors import InputError
from mfengine.pickles import Refused, load_record

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as clamped by diffusers' DiagonalGaussianDistribution


class LMDBImporter(Importer):
    """Keys `0`, `1`, ... and `num_samples`. Values have `moments`, `moments_flip` (with log variance), and `label`."""

    format = "lmdb"

    def __init__(self, path: Path) -> None:
        self._path, self._environment = path, open_lmdb(path)
        with self._environment.begin() as transaction:
            number = transaction.get(b"num_samples")
        if number is None or not number.isdigit():
            raise InputError(f"{path} has no num_samples: either writing was cut short, or it holds something else")
        self.count = int(number)
        self.fingerprint = f"{self.count} samples, transaction {self._environment.info()['last_txnid']}"

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / "data.mdb").is_file() if path.is_dir() else path.suffix in (".mdb", ".lmdb")

    def name_of(self, index: int) -> str:
        return f"record {index} of {self._path}"

    def load(self, index: int) -> tuple[list[np.ndarray], Any]:
        with lmdb_errors(SampleError), self._environment.begin() as transaction:
            data = transaction.get(str(index).encode())
        if data is None:
            raise SampleError("the record is missing")
        try:
            record = load_record(data)
        except Refused as refused:
            raise InputError(
                f"{self.name_of(index)} would run {refused} when unpickled: refused. Only arrays, numbers and "
                "text are read; do not open this file with pickle"
            ) from None
        except ValueError as error:
            raise SampleError(str(error)) from None
        if "moments" not in record:
            raise SampleError(f"it has no moments, only {', '.join(map(str, record))}: latents are needed, not images")
        flips = [record[name] for name in ("moments", "moments_flip") if name in record]
        return [_from_log_variance(float_array(moments, "moments")) for moments in flips], record.get("label")


def _from_log_variance(moments: np.ndarray) -> np.ndarray:
    """(2 C, H, W) with mean and log variance to the same with mean and standard deviation."""
    if moments.ndim != 3 or len(moments) % 2:
        raise SampleError(f"its shape is {moments.shape}, not (2 C, H, W) with mean and log variance")
    mean, log_variance = np.split(moments.astype(np.float32), 2)
    if (log_variance >= 0).all():
        raise SampleError("the second half of the channels has no negative values, so it is not a log variance")
    return np.concatenate([mean, np.exp(0.5 * log_variance.clip(*LOG_VARIANCE_RANGE))])
