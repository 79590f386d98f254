"""Data sets of the benchmarks: scikit-learn's digits (needs no network) and CIFAR-10.

The CIFAR-10 files are Python-2 pickles, and a pickle can name any function to be called. So each file is
compared with its published MD5 before it is read, and the unpickler knows only uint8 arrays, strings,
numbers, lists and dicts.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import os
import pickle
import pickletools
import reprlib
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER_NAME = "cifar-10-batches-py"
TRAIN_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_MD5 = {"test_batch": "40351d587109b95175f43aff81a1287e"}
ROWS_PER_BATCH = 10_000
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CHUNK = 1 << 20

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
# The paper's code divides by deviations within images, which are 20 % below those of the whole set. Larger inputs act
# as a higher learning rate, so its tables cannot be reproduced without them.
PUBLISHED_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task, normalised per channel by the mean and standard deviation of its training part.

    train_x, test_x: float32 [n, C, H, W]; train_y, test_y: int64 [n], indices into `classes`.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]


def load(name: str, root: str | Path = "data", download: bool = True, published: bool = False) -> Dataset:
    """The data set called `name`: "digits" or "cifar10" (read from `root`). ValueError for any other name.

    published: CIFAR-10 as the paper's code normalises it.
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(root, download, PUBLISHED_STATISTICS if published else None)
    raise ValueError(f"name: got {name!r}, expected 'digits' or 'cifar10'")


def load_digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits [1, 8, 8], always split into the same 1437 and 360, by class."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    images = digits.images.astype(np.float32)[:, None] / 16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    standardise_(train_x, test_x, channel_statistics(train_x))
    return Dataset("digits", train_x, train_y, test_x, test_y, tuple("0123456789"))


def load_cifar10(root: str | Path, download: bool = True, statistics: Statistics | None = None) -> Dataset:
    """CIFAR-10, images [3, 32, 32], from the official Python pickles in root/cifar-10-batches-py.

    statistics: mean and deviation of each channel to normalise by; by default those of the training set.
    Absent files are taken from root/cifar-10-python.tar.gz, which is downloaded if `download` allows it.
    FileNotFoundError: files are absent and `download` is False. RuntimeError: the download failed.
    ValueError: a file is not the published one; it is not used, and is fetched again once it is removed.
    """
    root = Path(root)
    ensure_cifar10(root, download)
    train_x, train_y = _read_batches(root / FOLDER_NAME, TRAIN_MD5)
    test_x, test_y = _read_batches(root / FOLDER_NAME, TEST_MD5)
    standardise_(train_x, test_x, statistics or channel_statistics(train_x))
    return Dataset("cifar10", train_x, train_y, test_x, test_y, CIFAR10_CLASSES)


def channel_statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation (the population's) of each channel of images [n, C, H, W]."""
    pairs = [torch.std_mean(channel.double(), correction=0) for channel in images.unbind(1)]
    return tuple(mean.item() for _, mean in pairs), tuple(std.item() for std, _ in pairs)


def standardise_(train_x: Tensor, test_x: Tensor, statistics: Statistics) -> None:
    """In place, in both float32 [n, C, H, W]: subtract each channel's mean and divide by its deviation."""
    for part in (train_x, test_x):
        for channel, (mean, std) in enumerate(zip(*statistics, strict=True)):
            part[:, channel].sub_(mean).div_(std)


def _read_batches(folder: Path, md5s: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The files named in `md5s`, in order: x/255 as float32 [n, 3, 32, 32] and labels int64 [n]."""
    images = torch.empty(len(md5s) * ROWS_PER_BATCH, 3, 32, 32)
    labels = torch.empty(len(images), dtype=torch.int64)
    for i, (name, md5) in enumerate(md5s.items()):
        rows = slice(i * ROWS_PER_BATCH, (i + 1) * ROWS_PER_BATCH)
        data, targets = read_batch(folder / name, md5)
        # torch wants a writable array; the one that is read shares the file's bytes.
        images[rows] = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
        labels[rows] = torch.tensor(targets)
    return images.div_(255), labels


def read_batch(path: Path, md5: str) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """One CIFAR-10 file: pixels uint8 [10000, 3072] and labels. ValueError if its MD5 or content is wrong."""
    raw = path.read_bytes()
    check_md5([raw], path, md5)
    return check_batch(unpickle(raw, path), path)


def check_md5(chunks: Iterable[bytes], path: Path, expected: str) -> None:
    """ValueError unless the MD5 of `chunks`, the content of `path`, is `expected` (32 hexadecimal digits)."""
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        raise ValueError(f"{path}: truncated or altered: its MD5 is {found}, expected {expected}")


def check_batch(batch: dict[object, object], path: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """The pixels and labels of an unpickled CIFAR-10 file. ValueError if they are not what is expected."""
    data, labels = batch.get(b"data"), batch.get(b"labels")
    shape = (ROWS_PER_BATCH, 3072)
    if not isinstance(data, np.ndarray) or data.shape != shape:
        got = data.shape if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: data is {got}, expected a uint8 array {shape}")
    if not isinstance(labels, list) or len(labels) != ROWS_PER_BATCH:
        got = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: labels is {got}, expected a list of {ROWS_PER_BATCH}")
    for label in labels:
        if type(label) is not int or not 0 <= label < len(CIFAR10_CLASSES):
            raise ValueError(f"{path}: label {reprlib.repr(label)}, expected an integer from 0 to 9")
    return data, labels


def unpickle(raw: bytes, path: Path) -> dict[object, object]:
    """The dict pickled in `raw`, the content of `path`; nothing that the pickle names is imported or called.

    Its values are uint8 arrays, strings, numbers, lists and dicts. Strings of Python 2 come out as bytes.
    ValueError names the file and the fault: a global that is not admitted, another dtype, a broken pickle.
    """
    try:
        _check_opcodes(raw)
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    # A broken pickle raises nearly any exception there is: IndexError, UnicodeDecodeError, MemoryError, ...
    except Exception as error:
        raise ValueError(f"{path}: refused to unpickle: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return {key: value.values if isinstance(value, _Array) else value for key, value in content.items()}


def _check_opcodes(raw: bytes) -> None:
    """Refuse what find_class never gets to see: a registered extension, an index that fills the memory."""
    # Walking the opcodes executes nothing, and refuses a string that claims to be longer than the file.
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"it names extension {argument}, expected nothing but NumPy uint8 arrays")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > len(raw):
            raise pickle.UnpicklingError(f"memo index {argument}, expected at most {len(raw)}")


class _Unpickler(pickle.Unpickler):
    """Gives stand-ins for the names that a pickled uint8 array needs, and refuses all others.

    NumPy's own functions would make any array the pickle asks for, object arrays included. The stand-ins make
    uint8 arrays only; having no __dict__ and a __setstate__ that checks, they cannot be altered by a pickle.
    """

    def find_class(self, module: str, name: str) -> object:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected nothing but NumPy uint8 arrays") from None


class _Standin:
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"state for {type(self).__name__}, expected none")


class _NdarrayName(_Standin):
    __slots__ = ()


class _Uint8(_Standin):
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        if state not in ((3, b"|", None, None, None, -1, -1, 0), (3, "|", None, None, None, -1, -1, 0)):
            raise pickle.UnpicklingError(f"dtype state {reprlib.repr(state)}, expected that of uint8")


class _DtypeName(_Standin):
    __slots__ = ()

    def __call__(self, code: object, align: object, copy: object) -> _Uint8:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"dtype {reprlib.repr(code)}, expected 'u1' (uint8)")
        return _Uint8()


class _Array(_Standin):
    """What a pickled array becomes; its pickle first makes it empty, then hands it its state."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: object) -> None:
        match state:
            case (1, tuple(shape), _Uint8(), False, bytes(raw)) if all(type(n) is int for n in shape):
                self.values = _uint8_array(shape, raw)
            case _:
                raise pickle.UnpicklingError(f"array state {reprlib.repr(state)}, expected C-ordered uint8")


def _uint8_array(shape: tuple[int, ...], raw: bytes) -> npt.NDArray[np.uint8]:
    if any(n < 0 for n in shape) or math.prod(shape) != len(raw):
        raise pickle.UnpicklingError(f"array shape {reprlib.repr(shape)} for {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape)


class _ReconstructName(_Standin):
    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        if not isinstance(kind, _NdarrayName):
            raise pickle.UnpicklingError(f"an array of type {type(kind).__name__}, expected numpy.ndarray")
        return _Array()


_ADMITTED: dict[tuple[str, str], _Standin] = {
    ("numpy.core.multiarray", "_reconstruct"): _ReconstructName(),
    ("numpy._core.multiarray", "_reconstruct"): _ReconstructName(),
    ("numpy", "ndarray"): _NdarrayName(),
    ("numpy", "dtype"): _DtypeName(),
}


def ensure_cifar10(root: Path, download: bool) -> None:
    """See that the six files of CIFAR-10 are in root/cifar-10-batches-py. Errors as in load_cifar10."""
    md5s = TRAIN_MD5 | TEST_MD5
    missing = {name: md5 for name, md5 in md5s.items() if not (root / FOLDER_NAME / name).exists()}
    if not missing:
        return
    archive = root / ARCHIVE_NAME
    if not archive.exists():
        if not download:
            raise FileNotFoundError(_how_to_get(root, missing))
        _download(archive, missing)
    _extract(archive, missing)


def _how_to_get(root: Path, missing: Iterable[str]) -> str:
    return (
        f"CIFAR-10: {', '.join(missing)} not found in {root / FOLDER_NAME}. "
        f"Let the archive be downloaded, or put {ARCHIVE_URL} into {root}"
    )


def _download(archive: Path, missing: Iterable[str]) -> None:
    """Fetch the archive (170 MB), showing progress on a terminal. RuntimeError if it does not come whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(ARCHIVE_URL, timeout=60) as response:
            length = response.headers.get("Content-Length")
            _store(_with_progress(response, length and int(length)), archive, ARCHIVE_MD5)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RuntimeError(f"{_how_to_get(archive.parent, missing)}. The download failed: {error}") from error


def _with_progress(stream: IO[bytes], total: int | None) -> Iterator[bytes]:
    from tqdm import tqdm

    with tqdm(desc=ARCHIVE_NAME, total=total, unit="B", unit_scale=True, disable=None) as bar:
        for chunk in _chunks(stream):
            bar.update(len(chunk))
            yield chunk


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _store(chunks: Iterator[bytes], path: Path, md5: str) -> None:
    """Write `chunks` to `path`, which appears only once it is whole and its MD5 is right, else ValueError."""
    # The process id keeps two runs that fetch at the same time out of each other's file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            check_md5(_copied(chunks, file), path, md5)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _copied(chunks: Iterable[bytes], file: IO[bytes]) -> Iterator[bytes]:
    """Each of `chunks`, once it is written to `file`."""
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def _extract(archive: Path, md5s: dict[str, str]) -> None:
    """Unpack only the files named in `md5s`, beside `archive`. ValueError if it is not the official one."""
    with archive.open("rb") as stream:
        check_md5(_chunks(stream), archive, ARCHIVE_MD5)
    folder = archive.parent / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        for name, md5 in md5s.items():
            # The path is built here, never taken from the archive.
            _store(_chunks(_member(tar, f"{FOLDER_NAME}/{name}", archive)), folder / name, md5)


def _member(tar: tarfile.TarFile, name: str, archive: Path) -> IO[bytes]:
    try:
        member = tar.getmember(name)
    except KeyError:
        raise ValueError(f"{archive}: has no {name}, expected the official archive of CIFAR-10") from None
    stream = tar.extractfile(member) if member.isfile() else None
    if stream is None:
        raise ValueError(f"{archive}: {name} is no regular file, expected the official archive of CIFAR-10")
    return stream
