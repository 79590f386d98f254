"""bench.learn.data: what is loaded, what is refused, what a failed download leaves behind. No network is used."""

from __future__ import annotations

import builtins
import copyreg
import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.learn import data

ROWS = 4
PATH = Path("some/data_batch_9")


def python2_string(raw: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(raw)) + raw


def array_pickle(
    raw: bytes, shape: bytes, *, code: bytes = b"u1", dtype_state: bytes | None = None, order: bytes = b"\x89"
) -> bytes:
    """The opcodes with which Python 2 pickles an array; `shape` is itself opcodes that make a tuple."""
    plain = b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + b"K\x00\x85" + python2_string(b"b") + b"\x87R")
        + (b"(K\x01" + shape)
        + (b"cnumpy\ndtype\n" + python2_string(code) + b"K\x00K\x01\x87R" + (dtype_state or plain) + b"b")
        + (order + python2_string(raw) + b"tb")
    )


def batch_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A CIFAR-10 file: protocol 2, strings of Python 2."""
    shape = b"M" + struct.pack("<H", pixels.shape[0]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    numbers = b"".join(b"J" + struct.pack("<i", label) for label in labels)
    return (
        b"\x80\x02}("
        + (python2_string(b"labels") + b"](" + numbers + b"e")
        + (python2_string(b"data") + array_pickle(pixels.tobytes(), shape))
        + b"u."
    )


def in_dict(opcodes: bytes) -> bytes:
    return b"\x80\x02}" + python2_string(b"data") + opcodes + b"s."


def message_id(value: object) -> str:
    return value if isinstance(value, str) else ""


def md5(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


class Official:
    """A stand-in for the published files: five and one batches of four rows, their MD5s and their archive."""

    def __init__(self, folder: Path) -> None:
        generator = np.random.default_rng(0)
        self.pixels = generator.integers(0, 256, (6, ROWS, 3072), dtype=np.uint8)
        self.labels = generator.integers(0, 10, (6, ROWS))
        names = [*data.TRAIN_MD5, *data.TEST_MD5]
        self.files = {
            name: batch_pickle(pixels, labels.tolist())
            for name, pixels, labels in zip(names, self.pixels, self.labels, strict=True)
        }
        self.root = folder / "data"
        self.batches = self.root / data.FOLDER_NAME
        self.served = folder / "served.tar.gz"

    def write(self) -> None:
        self.batches.mkdir(parents=True)
        for name, raw in self.files.items():
            (self.batches / name).write_bytes(raw)

    def read(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.batches.iterdir()}


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Official:
    files = Official(tmp_path)
    pack(files.served, {f"{data.FOLDER_NAME}/{name}": raw for name, raw in files.files.items()})
    monkeypatch.setattr(data, "ROWS_PER_BATCH", ROWS)
    monkeypatch.setattr(data, "TRAIN_MD5", {name: md5(files.files[name]) for name in data.TRAIN_MD5})
    monkeypatch.setattr(data, "TEST_MD5", {name: md5(files.files[name]) for name in data.TEST_MD5})
    monkeypatch.setattr(data, "ARCHIVE_MD5", md5(files.served.read_bytes()))
    monkeypatch.setattr(data, "ARCHIVE_URL", files.served.as_uri())
    return files


def serve(official: Official, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> None:
    pack(official.served, members)
    monkeypatch.setattr(data, "ARCHIVE_MD5", md5(official.served.read_bytes()))


class TestDigits:
    def test_is_the_same_split_every_time(self) -> None:
        first, second = data.load_digits(), data.load_digits()
        assert torch.equal(first.train_x, second.train_x)
        assert torch.equal(first.test_y, second.test_y)
        assert first.test_y[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]

    def test_splits_every_class_in_proportion(self) -> None:
        digits = data.load_digits()
        assert digits.train_y.bincount().tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
        assert digits.test_y.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]

    def test_images_are_sklearns_up_to_one_scale_and_shift(self) -> None:
        from sklearn.datasets import load_digits

        digits = data.load_digits()
        images = torch.cat([digits.train_x, digits.test_x])[:, 0].double()
        levels = (images - images.min()) / (images.max() - images.min()) * 16
        found = sorted(levels.round().long().flatten(1).tolist())
        assert found == sorted(load_digits().images.reshape(1797, 64).astype(int).tolist())
        assert (levels - levels.round()).abs().max() < 1e-5

    def test_is_normalised_by_its_training_part(self) -> None:
        digits = data.load_digits()
        assert digits.train_x.dtype == torch.float32
        assert digits.train_x.double().mean().abs() < 1e-6
        assert abs(digits.train_x.double().std(correction=0) - 1) < 1e-6
        assert digits.classes == tuple("0123456789")


class TestCifar10:
    def test_images_and_labels_match_a_direct_computation(self, official: Official) -> None:
        official.write()
        cifar = data.load_cifar10(official.root, download=False)
        pixels = official.pixels.reshape(6, ROWS, 3, 32, 32) / 255.0
        train = pixels[:5].reshape(-1, 3, 32, 32)
        mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
        np.testing.assert_allclose(cifar.train_x.numpy(), (train - mean) / std, atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(cifar.test_x.numpy(), (pixels[5] - mean) / std, atol=1e-6, rtol=1e-5)
        assert cifar.train_y.tolist() == official.labels[:5].flatten().tolist()
        assert cifar.test_y.tolist() == official.labels[5].tolist()

    def test_published_statistics_take_the_place_of_the_set_s_own(self, official: Official) -> None:
        official.write()
        cifar = data.load("cifar10", official.root, download=False, published=True)
        pixels = official.pixels.reshape(6, ROWS, 3, 32, 32) / 255.0
        mean = np.array([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1)
        std = np.array([0.2023, 0.1994, 0.2010]).reshape(1, 3, 1, 1)
        np.testing.assert_allclose(cifar.test_x.numpy(), (pixels[5] - mean) / std, atol=1e-6, rtol=1e-5)

    def test_types_and_classes(self, official: Official) -> None:
        official.write()
        cifar = data.load("cifar10", str(official.root), download=False)
        assert (cifar.train_x.dtype, cifar.train_y.dtype) == (torch.float32, torch.int64)
        assert (cifar.name, cifar.classes[0], cifar.classes[9]) == ("cifar10", "airplane", "truck")

    def test_the_channels_are_planes_of_1024_values_each(self, official: Official) -> None:
        official.write()
        images, _ = data._read_batches(official.batches, data.TEST_MD5)
        assert images[1, 2, 3, 4] == torch.tensor(official.pixels[5, 1, 2 * 1024 + 3 * 32 + 4] / 255.0).float()

    def test_absent_without_download_names_folder_files_and_address(self, official: Official) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            data.load_cifar10(official.root, download=False)
        for word in (str(official.batches), "data_batch_1", "test_batch", data.ARCHIVE_URL):
            assert word in str(caught.value)

    @pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]])
    def test_an_altered_file_is_refused_before_it_is_unpickled(
        self, official: Official, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
    ) -> None:
        official.write()
        altered = change(official.files["data_batch_3"])
        (official.batches / "data_batch_3").write_bytes(altered)
        unpickled: list[Path] = []
        unpickle = data.unpickle
        monkeypatch.setattr(data, "unpickle", lambda raw, path: unpickled.append(path) or unpickle(raw, path))
        with pytest.raises(ValueError, match="data_batch_3") as caught:
            data.load_cifar10(official.root)
        assert md5(altered) in str(caught.value)
        assert data.TRAIN_MD5["data_batch_3"] in str(caught.value)
        assert [path.name for path in unpickled] == ["data_batch_1", "data_batch_2"]

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'mnist', expected 'digits' or 'cifar10'"):
            data.load("mnist")


class TestCheckMd5:
    def test_joins_the_chunks(self) -> None:
        data.check_md5([b"ab", b"", b"c"], PATH, "900150983cd24fb0d6963f7d28e17f72")

    def test_reports_file_found_and_expected(self) -> None:
        with pytest.raises(ValueError, match=f"{PATH}.*900150983cd24fb0d6963f7d28e17f72.*0123"):
            data.check_md5([b"abc"], PATH, "0123")


class TestCheckBatch:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "ROWS_PER_BATCH", 2)

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({b"labels": [0, 9]}, "data is NoneType"),
            ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 9]}, r"data is \(2, 3071\)"),
            ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 9]}, r"data is \(3, 3072\)"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "labels is 1"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": b"ab"}, "labels is bytes"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "label 10"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [-1, 0]}, "label -1"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1.0]}, "label 1.0"),
        ],
        ids=message_id,
    )
    def test_refuses(self, batch: dict[object, object], message: str) -> None:
        with pytest.raises(ValueError, match=f"{PATH}: {message}"):
            data.check_batch(batch, PATH)


class TestUnpickle:
    def test_reads_arrays_lists_and_strings(self) -> None:
        pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
        content = data.unpickle(batch_pickle(pixels, [3, 300]), PATH)
        assert content[b"labels"] == [3, 300]
        np.testing.assert_array_equal(content[b"data"], pixels, strict=True)

    def test_the_hand_made_opcodes_are_what_numpy_reads(self) -> None:
        pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
        content = pickle.loads(batch_pickle(pixels, [3]), encoding="bytes")
        np.testing.assert_array_equal(content[b"data"], pixels, strict=True)

    @pytest.mark.parametrize("protocol", [3, 4])
    def test_reads_arrays_pickled_by_this_numpy(self, protocol: int) -> None:
        pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
        content = data.unpickle(pickle.dumps({"data": pixels, "n": 2**40}, protocol), PATH)
        assert content["n"] == 2**40
        np.testing.assert_array_equal(content["data"], pixels, strict=True)

    @pytest.mark.parametrize(
        ("opcodes", "named"),
        [
            (b"cbuiltins\neval\n" + python2_string(b"1") + b"\x85R", "builtins.eval"),
            (b"c__builtin__\neval\n" + python2_string(b"1") + b"\x85R", "__builtin__.eval"),
            (b"cos\nsystem\n" + python2_string(b"true") + b"\x85R", "os.system"),
            (b"cposix\nsystem\n" + python2_string(b"true") + b"\x85R", "posix.system"),
            (b"(" + python2_string(b"true") + b"ios\nsystem\n", "os.system"),
            (b"(cos\nsystem\n" + python2_string(b"true") + b"o", "os.system"),
            (b"\x8c\x02os\x8c\x06system\x93" + python2_string(b"true") + b"\x85R", "os.system"),
            (b"cnumpy\nload\n" + python2_string(b"x") + b"\x85R", "numpy.load"),
            (b"\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93)R", "numpy.ndarray.__reduce__"),
            (b"cnumpy\nndarray.__reduce__\n)R", "numpy.ndarray.__reduce__"),
            (b"cnumpy.core.multiarray\nscalar\n", "numpy.core.multiarray.scalar"),
            (b"cnumpy.core.multiarray\n_reconstruct.__globals__\n", "_reconstruct.__globals__"),
            (b"cbench.learn.data\n_Array\n", "bench.learn.data._Array"),
            (b"ccopyreg\n_reconstructor\n", "copyreg._reconstructor"),
            (b"c_codecs\nencode\n", "_codecs.encode"),
        ],
        ids=message_id,
    )
    def test_names_the_file_and_the_global_it_refuses(
        self, opcodes: bytes, named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[object] = []
        monkeypatch.setattr(os, "system", called.append)
        monkeypatch.setattr(builtins, "eval", called.append)
        with pytest.raises(ValueError) as caught:
            data.unpickle(in_dict(opcodes), PATH)
        assert str(PATH) in str(caught.value)
        assert named in str(caught.value)
        assert called == []

    def test_a_registered_extension_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[object] = []
        monkeypatch.setitem(copyreg._inverted_registry, 200, ("os", "system"))
        monkeypatch.setitem(copyreg._extension_cache, 200, called.append)
        with pytest.raises(ValueError, match="extension 200"):
            data.unpickle(in_dict(b"\x82\xc8" + python2_string(b"true") + b"\x85R"), PATH)
        assert called == []

    @pytest.mark.parametrize(
        ("opcodes", "message"),
        [
            (array_pickle(bytes(8), b"K\x01\x85", code=b"O8"), "dtype b'O8'"),
            (array_pickle(bytes(8), b"K\x02\x85", code=b"f4"), "dtype b'f4'"),
            (array_pickle(bytes(8), b"K\x08\x85", dtype_state=b"(K\x03NNNNK\x08K\x01K\x3ft"), "dtype state"),
            (array_pickle(bytes(8), b"K\x08\x85", order=b"\x88"), "C-ordered uint8"),
            (array_pickle(bytes(8), b"K\x09\x85"), r"array shape \(9,\) for 8 bytes"),
            (array_pickle(bytes(8), b"J\xff\xff\xff\xffJ\xf8\xff\xff\xff\x86"), r"array shape \(-1, -8\)"),
            (array_pickle(bytes(8), b"NK\x08\x86"), "C-ordered uint8"),
            (
                array_pickle(bytes(8), b"K\x08\x85").replace(b"cnumpy\nndarray", b"cnumpy\ndtype"),
                "_DtypeName",
            ),
            (array_pickle(bytes(8), b"K\x08\x85") + b"(K\x01K\x01\x85N\x89]tb", "C-ordered uint8"),
            (b"cnumpy\nndarray\n}b", "state for _NdarrayName"),
            (b"cnumpy\ndtype\nN}" + python2_string(b"__call__") + b"Ns\x86b", "state for _DtypeName"),
            (b"]}" + python2_string(b"append") + b"Nsb", "refused"),
            (b"cnumpy\nndarray\n)R", "not callable"),
            (b"cnumpy\nndarray\n)\x81", "NEWOBJ"),
            (b"cnumpy\nndarray\nq\x070h\x07)R", "not callable"),
            (b"h\x07", "7"),
            (b"Nr\xff\xff\xff\x7f", "memo index 2147483647"),
            (b"\x8e" + struct.pack("<Q", 2**40), "refused"),
            (b"Psecret\n", "persistent"),
        ],
        ids=message_id,
    )
    def test_refuses_everything_but_plain_uint8_arrays(self, opcodes: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=f"{PATH}: .*{message}"):
            data.unpickle(in_dict(opcodes), PATH)

    def test_a_pickle_leaves_no_trace_in_the_unpickler(self) -> None:
        pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
        slots = b"N}" + python2_string(b"__defaults__") + b")s\x86b"
        for name in (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"):
            with pytest.raises(ValueError, match="expected none"):
                data.unpickle(in_dict(name + slots), PATH)
        content = data.unpickle(batch_pickle(pixels, [1]), PATH)
        np.testing.assert_array_equal(content[b"data"], pixels, strict=True)

    def test_refuses_what_is_not_a_dict(self) -> None:
        with pytest.raises(ValueError, match="holds a list, expected a dict"):
            data.unpickle(b"\x80\x02].", PATH)

    def test_refuses_every_truncation(self) -> None:
        whole = batch_pickle(np.zeros((2, 3), np.uint8), [1, 2])
        for length in range(len(whole)):
            with pytest.raises(ValueError, match=str(PATH)):
                data.unpickle(whole[:length], PATH)

    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
    def test_altered_bytes_give_plain_values_or_a_value_error(self, changes: list[tuple[int, int]]) -> None:
        raw = bytearray(batch_pickle(np.zeros((2, 3), np.uint8), [1, 2]))
        for position, value in changes:
            raw[position % len(raw)] = value
        try:
            content = data.unpickle(bytes(raw), PATH)
        except ValueError as error:
            assert str(PATH) in str(error)
            return
        plain = (int, float, bool, bytes, str, list, tuple, dict, set, type(None), data._Standin)
        for value in content.values():
            assert isinstance(value, plain) or (type(value) is np.ndarray and value.dtype == np.uint8)


class TestDownload:
    def test_gets_checks_and_unpacks_the_six_files(self, official: Official) -> None:
        data.load_cifar10(official.root)
        assert official.read() == official.files
        assert sorted(path.name for path in official.root.iterdir()) == [data.FOLDER_NAME, data.ARCHIVE_NAME]

    def test_happens_once(self, official: Official) -> None:
        first = data.load_cifar10(official.root)
        official.served.unlink()
        (official.root / data.ARCHIVE_NAME).unlink()
        assert torch.equal(data.load_cifar10(official.root).test_x, first.test_x)

    def test_shows_progress_in_bytes(self, official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
        bars: list[RecordingBar] = []
        monkeypatch.setattr("tqdm.tqdm", lambda **options: bars.append(RecordingBar(options)) or bars[-1])
        data.load_cifar10(official.root)
        size = official.served.stat().st_size
        assert (bars[0].options["total"], bars[0].count) == (size, size)

    def test_unpacks_an_archive_put_there_by_hand(self, official: Official) -> None:
        official.root.mkdir()
        official.served.rename(official.root / data.ARCHIVE_NAME)
        data.load_cifar10(official.root, download=False)
        assert official.read() == official.files

    def test_leaves_files_that_are_there_alone(self, official: Official) -> None:
        official.write()
        (official.batches / "data_batch_2").unlink()
        kept = {path.name: path.stat().st_ino for path in official.batches.iterdir()}
        data.load_cifar10(official.root)
        assert official.read() == official.files
        assert all((official.batches / name).stat().st_ino == inode for name, inode in kept.items())

    def test_offline_names_folder_and_address(self, official: Official) -> None:
        official.served.unlink()
        with pytest.raises(RuntimeError, match="download failed") as caught:
            data.load_cifar10(official.root)
        assert str(official.batches) in str(caught.value)
        assert data.ARCHIVE_URL in str(caught.value)

    @pytest.mark.parametrize("change", [lambda raw: raw[:-100], lambda raw: raw + b"x"])
    def test_another_archive_is_dropped(self, official: Official, change: Callable[[bytes], bytes]) -> None:
        sent = change(official.served.read_bytes())
        official.served.write_bytes(sent)
        with pytest.raises(RuntimeError, match=f"{md5(sent)}, expected {data.ARCHIVE_MD5}"):
            data.load_cifar10(official.root)
        assert list(official.root.rglob("*")) == []

    def test_an_altered_archive_of_the_user_is_refused_and_kept(self, official: Official) -> None:
        official.root.mkdir()
        archive = official.root / data.ARCHIVE_NAME
        archive.write_bytes(b"not an archive")
        with pytest.raises(ValueError, match=f"{archive}: truncated or altered"):
            data.load_cifar10(official.root)
        assert list(official.root.iterdir()) == [archive]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionResetError])
    def test_an_interruption_leaves_nothing_and_can_be_repeated(
        self, official: Official, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        monkeypatch.setattr(data, "_CHUNK", 1000)
        read = data._chunks

        def interrupted(stream: io.BytesIO) -> Iterator[bytes]:
            yield next(read(stream))
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(data, "_chunks", interrupted)
            with pytest.raises((KeyboardInterrupt, RuntimeError)):
                data.load_cifar10(official.root)
        assert list(official.root.rglob("*")) == []
        data.load_cifar10(official.root)
        assert official.read() == official.files

    def test_an_interrupted_unpacking_is_taken_up_again(
        self, official: Official, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        members = {f"{data.FOLDER_NAME}/{name}": raw for name, raw in official.files.items()}
        with monkeypatch.context() as patch:
            serve(official, patch, members | {f"{data.FOLDER_NAME}/data_batch_3": b"other"})
            with pytest.raises(ValueError, match=r"data_batch_3: truncated or altered"):
                data.load_cifar10(official.root)
            assert sorted(official.read()) == ["data_batch_1", "data_batch_2"]
        serve(official, monkeypatch, members)
        (official.root / data.ARCHIVE_NAME).unlink()
        data.load_cifar10(official.root)
        assert official.read() == official.files

    def test_unpacks_nothing_but_the_six_files(
        self, official: Official, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        members = {f"{data.FOLDER_NAME}/{name}": raw for name, raw in official.files.items()}
        outside = {"../evil": b"x", str(tmp_path / "evil"): b"x", f"{data.FOLDER_NAME}/more": b"x"}
        serve(official, monkeypatch, outside | members)
        data.load_cifar10(official.root)
        found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert found == {*official.files, data.ARCHIVE_NAME, official.served.name}

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
    def test_a_member_that_is_no_file_is_refused(
        self, official: Official, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: bytes
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(official.files["data_batch_1"])
        with tarfile.open(official.served, "w:gz") as tar:
            info = tarfile.TarInfo(f"{data.FOLDER_NAME}/data_batch_1")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        monkeypatch.setattr(data, "ARCHIVE_MD5", md5(official.served.read_bytes()))
        with pytest.raises(ValueError, match="data_batch_1 is no regular file"):
            data.load_cifar10(official.root)
        assert official.read() == {}

    def test_an_archive_without_the_files_is_refused(self, official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
        serve(official, monkeypatch, {"readme.html": b"x"})
        with pytest.raises(ValueError, match=f"{data.ARCHIVE_NAME}: has no {data.FOLDER_NAME}/data_batch_1"):
            data.load_cifar10(official.root)


class RecordingBar:
    """Counts what a progress bar is told."""

    def __init__(self, options: dict[str, object]) -> None:
        self.options = options
        self.count = 0

    def __enter__(self) -> RecordingBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.count += count
