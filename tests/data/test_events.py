"""Recordings to events to frames, the parts of each data set, the frames on disk, and what is refused."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import numpy.lib.recfunctions
import pytest
import sklearn.neighbors

from keras_dsr.data import events, frame_cache, images, recordings
from keras_dsr.data.recordings import RecordingError
from keras_dsr.data.saccades import Saccades

EVENT = np.dtype([(name, "i8") for name in "txyp"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """No test reads or writes what a user keeps."""
    monkeypatch.setenv("KERAS_DSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Decoders and an integration of their own: events one by one, in plain Python.


def decode_bin(path: Path) -> list[tuple[int, int, int, int]]:
    data, found, overflow = path.read_bytes(), [], 0
    for start in range(0, len(data), 5):
        x, y, *rest = data[start : start + 5]
        if y == 240:
            overflow += 1 << 13
            continue
        found.append((((rest[0] & 0x7F) << 16) + (rest[1] << 8) + rest[2] + overflow, x, y, rest[0] >> 7))
    return found


def split_aedat(path: Path) -> tuple[bytes, bytes]:
    header, end, body = path.read_bytes().partition(b"#End Of ASCII Header\r\n")
    return header + end, body


def decode_aedat(path: Path) -> list[tuple[int, int, int, int]]:
    return [
        (moment, 127 - (address >> 1 & 127), address >> 8 & 127, 1 - address % 2)
        for address, moment in struct.iter_unpack(">II", split_aedat(path)[1])
    ]


def decode_poker(path: Path) -> list[tuple[int, int, int, int]]:
    return [tuple(map(int, row)) for row in np.load(path)]


def oracle(found: list[tuple[int, ...]], timesteps: int, shape: tuple[int, ...], slicing: str) -> np.ndarray:
    """Frames by counting: one event after another into a slice that is looked up by its borders."""
    if slicing == "number":
        each = len(found) // timesteps
        ends = [each * (j + 1) for j in range(timesteps - 1)] + [len(found)]
        slices = [next(j for j, end in enumerate(ends) if i < end) for i in range(len(found))]
    else:
        first, last = min(event[0] for event in found), max(event[0] for event in found)
        slices = []
        for event in found:
            j = 0
            while j < timesteps - 1 and (event[0] - first) * timesteps >= (j + 1) * max(last - first, 1):
                j += 1
            slices.append(j)
    counts = Counter(
        (j, event[2], event[1], event[3]) if len(shape) == 3 else (j, event[1])
        for j, event in zip(slices, found, strict=True)
    )
    frames = np.zeros((timesteps, *shape), int)
    for place, count in counts.items():
        frames[place] = count
    return frames


def everything(data) -> tuple[np.ndarray, np.ndarray]:
    parts = (data.train, data.validation, data.test)
    return np.concatenate([part.x for part in parts]), np.concatenate([part.labels for part in parts])


# Real recordings.


@pytest.fixture(scope="session")
def nmnist(unpacked, tmp_path_factory) -> Path:
    """Four training and two test recordings of each digit."""
    pytest.importorskip("tonic")
    full, few = unpacked("nmnist") / "NMNIST", tmp_path_factory.mktemp("few") / "NMNIST"
    for part, count in (("Train", 4), ("Test", 2)):
        for digit in range(10):
            target = few / part / str(digit)
            target.mkdir(parents=True)
            for path in sorted((full / part / str(digit)).iterdir())[:count]:
                shutil.copy2(path, target)
    return few.parent


@pytest.fixture
def own_nmnist(nmnist, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(nmnist, tmp_path / "own"))


@pytest.fixture(scope="session")
def aedat(unpacked, tmp_path_factory) -> Path:
    """Ten samples of 0.4 s of each of three objects, in FOLDER/CLASS/NUMBER.aedat."""
    folder = tmp_path_factory.mktemp("aedat")
    for name in ("Caixa", "Lapiseira", "Tesoura"):
        header, body = split_aedat(unpacked("dvs128_objects") / "dvs128-objects" / "DataSet2" / f"{name}.aedat")
        pairs = np.frombuffer(body, ">u4").reshape(-1, 2)
        (folder / name).mkdir()
        for number in range(10):
            start = pairs[0, 1] + 2_000_000 + number * 400_000
            sample = pairs[(pairs[:, 1] >= start) & (pairs[:, 1] < start + 400_000)]
            (folder / name / f"{number}.aedat").write_bytes(header + sample.tobytes())
    return folder


class TestIntegration:
    RECORDING = np.array(
        [(0, 0, 0, 1), (10, 1, 0, 0), (20, 1, 0, 0), (30, 2, 1, 1), (40, 0, 1, 1), (70, 2, 1, 0), (90, 2, 1, 0)], EVENT
    )

    def test_by_number_by_hand(self):
        # Two each, and the seventh in the last.
        frames = recordings.integrate(self.RECORDING, 3, (2, 3, 2), "number")
        assert {tuple(map(int, place)): int(frames[tuple(place)]) for place in np.argwhere(frames)} == {
            (0, 0, 0, 1): 1,
            (0, 0, 1, 0): 1,
            (1, 0, 1, 0): 1,
            (1, 1, 2, 1): 1,
            (2, 1, 0, 1): 1,
            (2, 1, 2, 0): 2,
        }

    def test_by_time_by_hand(self):
        # 30 us each, from 0, 30 and 60; the last event, at 90, is in the last.
        frames = recordings.integrate(self.RECORDING, 3, (2, 3, 2), "time")
        assert frames.sum((1, 2, 3)).tolist() == [3, 2, 2]
        assert frames[0, 0, 1].tolist() == [2, 0]

    def test_channels_have_no_polarity(self):
        frames = recordings.integrate(np.array([(0, 4), (1, 4), (2, 1)], [("t", int), ("x", int)]), 1, (6,))
        assert frames.tolist() == [[0, 1, 0, 0, 2, 0]]

    def test_events_at_one_moment_are_in_the_first_slice(self):
        frames = recordings.integrate(np.array([(5, 0, 0, 0)] * 4, EVENT), 2, (1, 1, 2), "time")
        assert frames[..., 0].ravel().tolist() == [4, 0]

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        found=st.lists(
            st.tuples(st.integers(0, 10**9), st.integers(0, 4), st.integers(0, 3), st.integers(0, 1)),
            min_size=1,
            max_size=60,
        ),
        timesteps=st.integers(1, 12),
        slicing=st.sampled_from(recordings.SLICINGS),
    )
    def test_any_events_count_once_where_they_belong(self, found, timesteps, slicing):
        hypothesis.assume(slicing == "time" or len(found) >= timesteps)
        found = sorted(found)
        frames = recordings.integrate(np.array(found, EVENT), timesteps, (4, 5, 2), slicing)
        assert frames.sum() == len(found)
        np.testing.assert_array_equal(frames, oracle(found, timesteps, (4, 5, 2), slicing))

    @pytest.mark.parametrize("slicing", recordings.SLICINGS)
    def test_agrees_with_tonic_where_tonic_keeps_all_events(self, slicing):
        transforms = pytest.importorskip("tonic.transforms")
        random = np.random.default_rng(0)
        found = np.zeros(400, EVENT)
        found["t"] = np.sort(random.integers(0, 10_000, 400))
        found["t"][[0, -1]] = 0, 10_000
        found["x"], found["y"], found["p"] = (random.integers(0, high, 400) for high in (5, 4, 2))
        kind = {"number": "n_event_bins", "time": "n_time_bins"}[slicing]
        theirs = transforms.ToFrame(sensor_size=(5, 4, 2), **{kind: 10})(found).transpose(0, 2, 3, 1)
        ours = recordings.integrate(found, 10, (4, 5, 2), slicing)
        # tonic's last slice by time lacks the last event.
        assert (ours - theirs).sum() == (slicing == "time")
        np.testing.assert_array_equal(ours[:-1], theirs[:-1])


class TestReaders:
    def test_nmnist(self, nmnist):
        for path in sorted(nmnist.rglob("*.bin"))[::10]:
            assert recordings.read(path)[["t", "x", "y", "p"]].tolist() == decode_bin(path)

    def test_aedat2(self, aedat):
        path = aedat / "Caixa" / "3.aedat"
        assert recordings.read(path).tolist() == decode_aedat(path)
        assert len(decode_aedat(path)) > 1000

    def test_aedat2_by_hand(self, tmp_path):
        path = tmp_path / "one.aedat"
        pairs = [(0x0000, 5), (0x7FFF, 6), (0x8000, 7), (0x8000_0000, 7), (0x0103, 8)]
        path.write_bytes(b"#!AER-DAT2.0\r\n# comment\r\n" + b"".join(struct.pack(">II", *pair) for pair in pairs))
        # The two that no pixel sent are not events.
        assert recordings.read(path).tolist() == [(5, 127, 0, 1), (6, 0, 127, 0), (8, 126, 1, 0)]

    def test_time_of_aedat2_rises_across_the_counters_overflow(self, tmp_path):
        path = tmp_path / "long.aedat"
        moments = [2**32 - 10, 2**32 - 1, 3, 8]
        path.write_bytes(b"#!AER-DAT2.0\r\n" + b"".join(struct.pack(">II", 0, moment) for moment in moments))
        assert np.diff(recordings.read(path)["t"]).tolist() == [9, 4, 5]

    def test_npy_and_npz(self, tmp_path):
        expected = [(1, 2, 3, 0), (4, 5, 6, 1)]
        found = np.array(expected, EVENT)
        np.save(tmp_path / "fields.npy", np.lib.recfunctions.repack_fields(found[["x", "p", "t", "y"]]))
        np.save(tmp_path / "columns.npy", np.array(expected, "u8"))
        np.savez(tmp_path / "arrays.npz", t=found["t"], x=found["x"].astype("f4"), y=found["y"], p=found["p"] > 0)
        for name in ("fields.npy", "columns.npy", "arrays.npz"):
            assert recordings.read(tmp_path / name).tolist() == expected

    def test_aedat4_is_left_to_tonic(self, tmp_path, monkeypatch):
        found = np.array([(7, 1, 2, True)], [("t", "u8"), ("x", "u2"), ("y", "u2"), ("on", "?")])
        monkeypatch.setattr(pytest.importorskip("tonic.io"), "read_aedat4", lambda path: found)
        assert recordings.read(tmp_path / "a.aedat4").tolist() == [(7, 1, 2, 1)]

    def test_poker_dvs_as_tonic_reads_it(self, unpacked):
        tonic = pytest.importorskip("tonic")
        folder = unpacked("pokerdvs")
        found = events.DATASETS["poker_dvs"].find(folder / "POKERDVS")
        theirs = tonic.datasets.POKERDVS(save_to=str(folder), train=False)
        read = Counter((one.label, found.read(one).tobytes()) for one in found.test)
        assert read == Counter((label, one.astype(EVENT).tobytes()) for one, label in theirs)

    def test_what_is_said_of_sensors_and_classes_is_what_tonic_says(self):
        sets = pytest.importorskip("tonic").datasets
        assert sets.NMNIST.sensor_size == (34, 34, 2)
        assert sets.POKERDVS.sensor_size == (35, 35, 2)
        assert tuple(sets.POKERDVS.classes) == ("cl", "he", "di", "sp")
        assert (*sets.SHD.sensor_size,) == (700, 1, 1)
        assert sets.DVSGesture.sensor_size == sets.CIFAR10DVS.sensor_size == events._DVS128
        assert tuple(sets.DVSGesture.classes) == events._GESTURES
        assert sets.CIFAR10DVS.classes == {name: label for label, name in enumerate(events._CIFAR10)}


class TestFrames:
    @pytest.mark.parametrize("slicing", recordings.SLICINGS)
    def test_nmnist(self, nmnist, slicing):
        data = events.load("nmnist", timesteps=7, data_dir=nmnist, slicing=slicing, validation=0.25)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 10, 20]
        assert (data.classes, data.input_shape, data.class_names) == (10, (7, 34, 34, 2), tuple("0123456789"))
        assert (data.mean, data.std) == ((0.0, 0.0), (1.0, 1.0))
        assert data.train.x.dtype == "uint8"
        for label in range(10):
            expected = {}
            for path in sorted((nmnist / "NMNIST" / "Test" / str(label)).iterdir())[: 1 if label else 2]:
                found = decode_bin(path)
                frames = oracle(found, 7, (34, 34, 2), slicing)
                assert frames.sum() == len(found)
                expected[frames.astype("uint8").tobytes()] = None
            assert expected.keys() <= {one.tobytes() for one in data.test.x[data.test.labels == label]}

    def test_poker_dvs(self, unpacked):
        folder = unpacked("pokerdvs")
        data = events.load("poker_dvs", timesteps=5, data_dir=folder)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [44, 4, 20]
        assert (data.classes, data.input_shape) == (4, (5, 35, 35, 2))
        for label, name in enumerate(data.class_names):
            paths = sorted((folder / "POKERDVS" / "pips_test" / name).glob("*.npy"))
            expected = Counter(oracle(decode_poker(path), 5, (35, 35, 2), "number").tobytes() for path in paths)
            assert expected == Counter(one.astype(int).tobytes() for one in data.test.x[data.test.labels == label])

    def test_a_folder_of_aedat(self, aedat):
        data = events.load("folder", timesteps=4, data_dir=aedat)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [24, 3, 3]
        assert (data.class_names, data.input_shape) == (("Caixa", "Lapiseira", "Tesoura"), (4, 128, 128, 2))
        x, labels = everything(data)
        for label, name in enumerate(data.class_names):
            expected = Counter()
            for path in (aedat / name).iterdir():
                found = decode_aedat(path)
                frames = oracle(found, 4, (128, 128, 2), "number")
                assert frames.sum() == len(found)
                expected[frames.tobytes()] += 1
            assert expected == Counter(one.astype(int).tobytes() for one in x[labels == label])

    def test_a_folder_with_official_parts(self, nmnist):
        ours = events.load("folder", timesteps=3, data_dir=nmnist / "NMNIST")
        theirs = events.load("nmnist", timesteps=3, data_dir=nmnist)
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(ours, part).x, getattr(theirs, part).x)

    def test_a_folder_of_arrays_needs_the_sensor(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / "arrays" / name).mkdir(parents=True)
            for number in range(3):
                np.save(tmp_path / "arrays" / name / f"{number}.npy", np.array([(0, number, 1, 0)] * 300, EVENT))
        with pytest.raises(ValueError, match=r"Pass sensor=\(height, width\)"):
            events.load("folder", timesteps=1, data_dir=tmp_path / "arrays")
        data = events.load("folder", timesteps=1, data_dir=tmp_path / "arrays", sensor=(2, 3))
        assert data.input_shape == (1, 2, 3, 2)
        # 300 events at a pixel do not fit in 8 bits.
        assert data.train.x.dtype == "uint16"
        assert {int(one.max()) for one in everything(data)[0]} == {300}

    @pytest.fixture
    def dvs_cifar10(self, aedat, tmp_path) -> Path:
        """Eleven short recordings a class, called as in the original and told apart by their last event's row."""
        header, body = split_aedat(aedat / "Caixa" / "0.aedat")
        for label, name in enumerate(events._CIFAR10):
            (tmp_path / "CIFAR10DVS" / name).mkdir(parents=True)
            for number in range(11):
                mark = struct.pack(">II", number << 8 | label << 1, 2**32 - 1)
                path = tmp_path / "CIFAR10DVS" / name / f"cifar10_{name}_{number}.aedat"
                path.write_bytes(header + body[: 8 * 500] + mark)
        return tmp_path

    def test_the_last_tenth_of_dvs_cifar10_by_number_is_for_testing(self, dvs_cifar10):
        data = events.load("dvs_cifar10", timesteps=2, data_dir=dvs_cifar10, size=(128, 128), validation=0.2)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [80, 20, 10]
        assert data.test.labels.tolist() == list(range(10))
        assert data.class_names == events._CIFAR10
        path = dvs_cifar10 / "CIFAR10DVS" / "truck" / "cifar10_truck_10.aedat"
        np.testing.assert_array_equal(data.test.x[9], oracle(decode_aedat(path), 2, (128, 128, 2), "number"))

    def test_frames_of_dvs_cifar10_are_resized_between_pixel_centres(self, dvs_cifar10):
        settings = {"timesteps": 2, "data_dir": dvs_cifar10}
        resized = events.load("dvs_cifar10", **settings).test.x
        full = events.load("dvs_cifar10", size=(128, 128), **settings).test.x.astype(float)
        assert (resized.shape, resized.dtype) == ((10, 2, 48, 48, 2), "float32")
        for row, column in ((0, 0), (20, 31), (47, 47), (13, 2)):
            expected = 0
            y, x = ((index + 0.5) * 128 / 48 - 0.5 for index in (row, column))
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    expected += (1 - abs(y - i)) * (1 - abs(x - j)) * full[:, :, min(i, 127), min(j, 127)]
            np.testing.assert_allclose(resized[:, :, row, column], expected, atol=1e-5)

    def test_any_camera_can_be_resized(self, nmnist):
        data = events.load("nmnist", timesteps=2, data_dir=nmnist, size=(17, 20))
        assert (data.input_shape, data.train.x.dtype) == ((2, 17, 20, 2), "float32")

    def test_dvs_gesture(self, tmp_path):
        random = np.random.default_rng(0)
        rows = {}
        for part, users in (("ibmGestureTrain", 3), ("ibmGestureTest", 1)):
            for user in range(users):
                folder = tmp_path / "DVSGesture" / part / f"user{user:02}_led"
                folder.mkdir(parents=True)
                for label in range(11):
                    found = random.integers(0, (128, 128, 2, 10), (40, 4))
                    found[:, 3] = np.sort(found[:, 3])
                    np.save(folder / f"{label}.npy", found)
                    rows[part, user, label] = [(t * 1000, x, y, p) for x, y, p, t in found.tolist()]
        data = events.load("dvs_gesture", timesteps=3, data_dir=tmp_path, slicing="time", validation=1 / 3)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [22, 11, 11]
        assert (data.classes, data.class_names[7]) == (11, "Arm roll")
        for one, label in zip(data.test.x, data.test.labels, strict=True):
            np.testing.assert_array_equal(one, oracle(rows["ibmGestureTest", 0, label], 3, (128, 128, 2), "time"))

    @pytest.fixture
    def shd(self, tmp_path) -> Path:
        """Three words of SHD's format: half-precision seconds and channels, of unequal length."""
        h5py = pytest.importorskip("h5py")
        random = np.random.default_rng(0)
        (tmp_path / "SHD").mkdir()
        for part, count in (("train", 12), ("test", 6)):
            with h5py.File(tmp_path / "SHD" / f"shd_{part}.h5", "w") as file:
                lengths = random.integers(20, 40, count)
                times = file.create_dataset("spikes/times", (count,), h5py.vlen_dtype("f2"))
                units = file.create_dataset("spikes/units", (count,), h5py.vlen_dtype("u2"))
                for index, length in enumerate(lengths):
                    times[index] = np.sort(random.random(length)).astype("f2")
                    units[index] = random.integers(0, 700, length).astype("u2")
                file["labels"] = np.arange(count) % 3
                file["extra/keys"] = [b"null", b"eins", b"zwei"]
                file["extra/speaker"] = np.zeros(count, int)
        return tmp_path

    def test_shd(self, shd):
        pytest.importorskip("tonic")
        import h5py

        data = events.load("shd", timesteps=5, data_dir=shd, slicing="time", validation=0.25)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 6]
        assert (data.input_shape, data.mean, data.std) == ((5, 700), (0.0,), (1.0,))
        assert data.class_names == ("null", "eins", "zwei")
        with h5py.File(shd / "SHD" / "shd_test.h5") as file:
            for index in range(6):
                times, units = file["spikes/times"][index].astype(float), file["spikes/units"][index].astype(int)
                found = [(int(t * 1e6), unit) for t, unit in zip(times.tolist(), units.tolist(), strict=True)]
                np.testing.assert_array_equal(data.test.x[index], oracle(found, 5, (700,), "time"))

    def test_shd_has_nothing_to_resize_and_is_refused_when_spoilt(self, shd):
        pytest.importorskip("tonic")
        with pytest.raises(ValueError, match="'shd' have no height and width to resize"):
            events.load("shd", timesteps=5, data_dir=shd, size=(4, 4))
        path = shd / "SHD" / "shd_train.h5"
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(RecordingError, match=r"shd_train\.h5: the file cannot be read, it is truncated or corrupt"):
            events.load("shd", timesteps=5, data_dir=shd)

    def test_batches_read_the_frames_from_disk(self, nmnist):
        data = events.load("nmnist", timesteps=2, data_dir=nmnist)
        assert isinstance(data.test.x, np.memmap)
        x, labels = next(iter(data.batches(data.test, 8)))
        np.testing.assert_array_equal(x, data.test.x[:8].astype("float32"))
        np.testing.assert_array_equal(labels, data.test.labels[:8])


class TestParts:
    def test_each_recording_is_in_one_part_and_each_class_gives_its_share(self, nmnist):
        x, labels = everything(events.load("nmnist", timesteps=1, data_dir=nmnist))
        assert np.bincount(labels).tolist() == [6] * 10
        assert len({one.tobytes() for one in x}) == 60

    @pytest.mark.parametrize(("validation", "counts"), [(0, [4, 0]), (0.1, [3, 1]), (0.5, [2, 2]), (0.7, [1, 3])])
    def test_shares(self, nmnist, validation, counts):
        found = events.DATASETS["nmnist"].find(nmnist / "NMNIST")
        parts = events._parts("nmnist", found, validation)
        for part, count in zip(("train", "validation"), counts, strict=True):
            assert np.bincount([one.label for one in parts[part]], minlength=10).tolist() == [count] * 10
        assert sorted(map(str, [*parts["train"], *parts["validation"]])) == sorted(map(str, found.train))

    def test_a_cut_is_the_same_each_time_whatever_the_other_classes_are(self):
        def some(counts):
            return [
                events.Recording(Path(f"{label}-{number}"), label)
                for label, count in enumerate(counts)
                for number in range(count)
            ]

        _, few = events._hold_out(some([100, 50]), 0.1, "ab", draw=0)
        _, more = events._hold_out(some([100, 80, 30]), 0.1, "abc", draw=0)
        _, other = events._hold_out(some([100, 50]), 0.1, "ab", draw=1)
        assert [one for one in few if one.label == 0] == [one for one in more if one.label == 0]
        assert few != other
        assert Counter(one.label for one in few) == {0: 10, 1: 5}

    def test_numbers_sort_as_numbers(self):
        names = ["cifar10_cat_10.aedat", "cifar10_cat_9.aedat", "cifar10_cat_100.aedat"]
        assert [path.name for path in sorted(map(Path, names), key=events._natural)] == [names[1], names[0], names[2]]


@pytest.fixture(scope="module")
def digits_events():
    return events.load("digits_events", timesteps=6)


class TestDigitsEvents:
    def test_the_parts_are_those_of_the_images(self, digits_events):
        digits = images.digits()
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(digits_events, part).labels, getattr(digits, part).labels)
        assert (digits_events.input_shape, digits_events.classes) == ((6, 16, 16, 2), 10)
        assert digits_events.class_names == digits.class_names

    def test_it_is_the_same_each_time_and_needs_no_file(self, digits_events, cache):
        again = events.load("digits_events", timesteps=6)
        np.testing.assert_array_equal(again.test.x, digits_events.test.x)
        assert not cache.exists()

    def test_each_recording_has_events_of_both_polarities_in_each_step(self, digits_events):
        x, _ = everything(digits_events)
        assert x.dtype == "uint8"
        assert np.all(x.sum((2, 3)) > 0)

    def test_the_digits_can_be_told_apart(self, digits_events):
        nearest = sklearn.neighbors.KNeighborsClassifier(1)
        nearest.fit(digits_events.train.x.reshape(len(digits_events.train), -1), digits_events.train.labels)
        assert nearest.score(digits_events.test.x.reshape(len(digits_events.test), -1), digits_events.test.labels) > 0.9

    def test_its_parts_are_fixed(self):
        with pytest.raises(ValueError, match=r"parts of 'digits_events' are fixed. Leave validation out. Received 0.2"):
            events.load("digits_events", timesteps=6, validation=0.2)


class TestSaccades:
    def test_a_bright_pixel_turns_on_where_it_comes_and_off_where_it_goes(self):
        # Without mismatch, each pixel's events add up to the change of its brightness to within a threshold.
        camera = Saccades(mismatch=0)
        image = np.zeros((1, 8, 8))
        image[0, 3, 3] = 1
        (found,) = camera.record(image)
        path = camera._path()
        middle = np.argmax(path[:, 1])
        half = found[found["t"] < middle * camera.duration / camera.steps]
        net = np.zeros((16, 16))
        np.add.at(net, (half["y"], half["x"]), 2 * half["p"] - 1)
        change = (camera._see(image, path[middle]) - camera._see(image, path[0]))[0]
        assert np.abs(net * camera.threshold - change).max() < camera.threshold * (1 + 1e-9)
        assert net.max() > 0 > net.min()

    def test_time_rises_and_fills_the_three_saccades(self):
        for found in Saccades().record(np.random.default_rng(0).random((3, 8, 8))):
            assert np.all(np.diff(found["t"]) >= 0)
            assert 0 <= found["t"].min() < 5000
            assert 295_000 < found["t"].max() < 300_000

    def test_the_seed_decides(self):
        image = np.random.default_rng(0).random((1, 8, 8))
        first, same, other = (Saccades(seed=seed).record(image)[0] for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, same)
        assert not np.array_equal(first, other)

    def test_a_blank_image_gives_no_events(self):
        assert [len(found) for found in Saccades().record(np.zeros((2, 8, 8)))] == [0, 0]


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "frames").iterdir())


def refuse_to_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("a recording was read")

    for suffix in recordings.READERS:
        monkeypatch.setitem(recordings.READERS, suffix, read)


class TestCache:
    def test_recordings_are_read_once(self, nmnist, cache, monkeypatch):
        first = events.load("nmnist", timesteps=3, data_dir=nmnist)
        refuse_to_read(monkeypatch)
        again = events.load("nmnist", timesteps=3, data_dir=nmnist)
        np.testing.assert_array_equal(first.train.x, again.train.x)
        np.testing.assert_array_equal(first.train.labels, again.train.labels)
        assert len(kept(cache)) == 1

    def test_a_data_set_that_moves_keeps_its_frames(self, own_nmnist, tmp_path, monkeypatch):
        events.load("nmnist", timesteps=3, data_dir=own_nmnist)
        own_nmnist.rename(tmp_path / "elsewhere")
        refuse_to_read(monkeypatch)
        events.load("nmnist", timesteps=3, data_dir=tmp_path / "elsewhere")

    @pytest.mark.parametrize(
        "other",
        [{"timesteps": 4}, {"slicing": "time"}, {"size": (16, 16)}, {"validation": 0.5}, {"skip_corrupt": True}],
        ids=lambda other: next(iter(other)),
    )
    def test_other_settings_make_other_frames(self, nmnist, cache, other):
        settings = {"timesteps": 3, "data_dir": nmnist}
        events.load("nmnist", **settings)
        events.load("nmnist", **{**settings, **other})
        assert len(kept(cache)) == 2

    @pytest.mark.parametrize("change", ["time", "size", "name", "gone"])
    def test_a_recording_that_changes_makes_other_frames(self, own_nmnist, cache, change):
        path = sorted((own_nmnist / "NMNIST" / "Train" / "3").iterdir())[0]
        events.load("nmnist", timesteps=3, data_dir=own_nmnist)
        if change == "time":
            os.utime(path, ns=(0, 0))
        elif change == "size":
            path.write_bytes(path.read_bytes()[:-5])
        elif change == "name":
            path.rename(path.with_name("99999.bin"))
        else:
            path.unlink()
        events.load("nmnist", timesteps=3, data_dir=own_nmnist)
        assert len(kept(cache)) == 2

    def test_frames_can_be_kept_anywhere(self, nmnist, cache, tmp_path):
        events.load("nmnist", timesteps=3, data_dir=nmnist, cache_dir=tmp_path / "kept")
        assert not cache.exists()
        (folder,) = (tmp_path / "kept").iterdir()
        assert sorted(path.name for path in folder.iterdir()) == ["frames.npy", "labels.npz", "skipped.json"]

    def test_an_error_while_building_leaves_nothing(self, nmnist, cache, monkeypatch):
        integrate, calls = recordings.integrate, []

        def fail(*arguments):
            calls.append(arguments)
            if len(calls) == 20:
                raise OSError("no space left on device")
            return integrate(*arguments)

        monkeypatch.setattr(recordings, "integrate", fail)
        with pytest.raises(OSError, match="no space left"):
            events.load("nmnist", timesteps=3, data_dir=nmnist)
        assert kept(cache) == []
        assert len(events.load("nmnist", timesteps=3, data_dir=nmnist).test) == 20

    def test_two_processes_at_once_make_one_complete_cache(self, nmnist, cache, tmp_path):
        # Both are ready before either starts, and reading takes long enough for both to be at it.
        script = """
import sys, time
from pathlib import Path
from keras_dsr.data import events, recordings
integrate, calls = recordings.integrate, []
def slow(*arguments):
    calls.append(arguments)
    time.sleep(0.02)
    return integrate(*arguments)
recordings.integrate = slow
data_dir, meeting, me = sys.argv[1:]
(Path(meeting) / me).touch()
while len(list(Path(meeting).iterdir())) < 2:
    time.sleep(0.01)
data = events.load("nmnist", timesteps=3, data_dir=data_dir)
print(len(calls), int(data.train.x.sum()), len(data.train))
"""
        (tmp_path / "meeting").mkdir()
        command = [sys.executable, "-c", script, str(nmnist), str(tmp_path / "meeting")]
        both = [
            subprocess.Popen([*command, me], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for me in "ab"
        ]
        said = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        (folder,) = kept(cache)
        assert not folder.startswith(".")
        data = events.load("nmnist", timesteps=3, data_dir=nmnist)
        expected = f"60 {int(data.train.x.sum())} {len(data.train)}"
        assert [out.strip() for out, _ in said] == [expected, expected]
        assert kept(cache) == [folder]

    def test_who_is_second_uses_what_the_first_made(self, tmp_path):
        def build(beside):
            (beside / "file").write_text("second")
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "file").write_text("first")

        assert frame_cache.whole_folder(tmp_path / "folder", build) == tmp_path / "folder"
        assert (tmp_path / "folder" / "file").read_text() == "first"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_a_builder_that_is_killed_leaves_nothing_that_counts(self, tmp_path):
        # The module alone: it loads in a moment.
        script = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("frame_cache", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["frame_cache"] = module
spec.loader.exec_module(module)
def build(beside):
    (beside / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
module.whole_folder(Path(sys.argv[2]), build)
"""
        folder = tmp_path / "folder"
        path = importlib.util.find_spec("keras_dsr.data.frame_cache").origin
        done = subprocess.run([sys.executable, "-c", script, path, str(folder)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not folder.exists()
        frame_cache.whole_folder(folder, lambda beside: (beside / "file").write_text("whole") and None)
        assert (folder / "file").read_text() == "whole"

    def test_integers_widen_as_they_must(self, tmp_path):
        arrays = [np.full((2, 3), value) for value in (7, 255, 256, 3, 70_000)]
        for count, dtype in ((2, "uint8"), (4, "uint16"), (5, "uint32")):
            with frame_cache.FrameWriter(tmp_path / "frames.npy", 6, (2, 3)) as writer:
                for array in arrays[:count]:
                    writer.append(array)
            found = np.load(tmp_path / "frames.npy")
            assert (found.shape, found.dtype) == ((6, 2, 3), dtype)
            np.testing.assert_array_equal(found[:count], arrays[:count])
            assert [path.name for path in tmp_path.iterdir()] == ["frames.npy"]


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-3], "empty": b"", "garbage": b"\xff" * 4000}[how])


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "nmnits"}, r"one of \['digits_events', .*\]. Received 'nmnits'. Did you mean 'nmnist'\?"),
            ({"name": "imagenet-21k"}, r"Received 'imagenet-21k'.$"),
            ({"timesteps": 0}, "timesteps is a number of slices, 1 or more. Received timesteps=0"),
            ({"slicing": "event"}, r"slicing is one of \('number', 'time'\). Received slicing='event'"),
            ({"validation": 1}, "from 0 to less than 1. Received 1"),
            ({"validation": -0.1}, "Received -0.1"),
            ({"size": (0, 4)}, r"size is \(height, width\) in pixels, each 1 or more. Received size=\(0, 4\)"),
            ({"size": (4,)}, r"Received size=\(4,\)"),
            ({"sensor": (34, 34)}, "sensor is for 'folder'; the sensor of 'nmnist' is known"),
            ({"name": "folder", "sensor": (0, 1)}, r"sensor is \(height, width\) in pixels"),
            ({"name": "folder"}, "'folder' is a folder of recordings. Pass it as data_dir"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            events.load(**{"name": "nmnist", "timesteps": 3, **arguments})

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nmnist", "NMNIST, .*It has Train and Test. .*download=True .about 1.2 GB"),
            ("dvs_cifar10", "CIFAR10DVS, .*It has airplane and truck. Unpack .*figshare.*several GB"),
            ("dvs_gesture", "DVSGesture, .*It has ibmGestureTrain and ibmGestureTest. .*about 3 GB"),
            ("poker_dvs", "POKERDVS, .*It has pips_train and pips_test. .*1 MB"),
            ("shd", "SHD, .*It has shd_train.h5 and shd_test.h5. .*about 0.2 GB"),
            ("folder", "Name a folder that has a folder of recordings .* for each class"),
        ],
    )
    def test_a_data_set_that_is_not_there(self, tmp_path, name, message):
        with pytest.raises(FileNotFoundError, match=f"The data set '{name}' is not at {tmp_path}/absent.*{message}"):
            events.load(name, timesteps=3, data_dir=tmp_path / "absent")

    def test_it_is_looked_for_in_the_cache_by_default(self, cache):
        with pytest.raises(FileNotFoundError, match=f"is not at {cache}/data/NMNIST, {cache}/data. "):
            events.load("nmnist", timesteps=3)

    def test_tonic_downloads_only_when_it_may(self, nmnist, tmp_path, monkeypatch):
        datasets = pytest.importorskip("tonic").datasets
        asked = []

        class Fake:
            def __init__(self, save_to, train=True):
                asked.append(train)
                part = "Train" if train else "Test"
                shutil.copytree(nmnist / "NMNIST" / part, Path(save_to) / "NMNIST" / part)

        monkeypatch.setattr(datasets, "NMNIST", Fake)
        with pytest.raises(FileNotFoundError):
            events.load("nmnist", timesteps=3, data_dir=tmp_path / "new")
        assert asked == []
        for _ in range(2):
            assert len(events.load("nmnist", timesteps=3, data_dir=tmp_path / "new", download=True).test) == 20
        assert asked == [True, False]

    @pytest.mark.parametrize("name", ["nmnist", "shd"])
    def test_without_tonic(self, name, tmp_path, request, monkeypatch):
        if name == "nmnist":
            folder = request.getfixturevalue("nmnist")
        else:
            folder = tmp_path
            for path in (tmp_path / "shd_train.h5", tmp_path / "shd_test.h5"):
                path.touch()
        monkeypatch.setitem(sys.modules, "tonic", None)
        with pytest.raises(ImportError, match=r"read by tonic, .*pip install 'keras-dsr\[data\]'"):
            events.load(name, timesteps=3, data_dir=folder)

    def test_without_aedat(self, tmp_path, monkeypatch):
        pytest.importorskip("tonic")
        monkeypatch.setitem(sys.modules, "aedat", None)
        with pytest.raises(ImportError, match=r"read by the package aedat, .*pip install aedat"):
            recordings.read(tmp_path / "a.aedat4")

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("truncated", "the file is truncated: an event has 5 bytes, 2 are left over"),
            ("empty", "0 events are too few for 3 slices by number: at least 3"),
            ("garbage", r"outside of the sensor: y must be in 0\.\.33\. Received 255\.\.255"),
        ],
    )
    def test_spoilt_bin(self, own_nmnist, how, message):
        path = sorted((own_nmnist / "NMNIST" / "Test" / "4").iterdir())[1]
        spoil(path, how)
        with pytest.raises(RecordingError, match=f"^{path}: .*{message}"):
            events.load("nmnist", timesteps=3, data_dir=own_nmnist)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("truncated", "the file is truncated: an event has 8 bytes, 5 are left over"),
            ("empty", "an AEDAT-2.0 file starts with '#!AER-DAT2.0'. Received b''"),
            ("garbage", "an AEDAT-2.0 file starts with"),
            ("header", "the file ends within its header"),
            ("camera", "addresses of a DVS128 camera have 15 bits. Received 0x10000"),
        ],
    )
    def test_spoilt_aedat(self, aedat, tmp_path, how, message):
        folder = Path(shutil.copytree(aedat, tmp_path / "own"))
        path = folder / "Caixa" / "5.aedat"
        if how == "header":
            path.write_bytes(path.read_bytes()[:50])
        elif how == "camera":
            path.write_bytes(b"#!AER-DAT2.0\r\n" + struct.pack(">II", 0x10000, 0))
        else:
            spoil(path, how)
        with pytest.raises(RecordingError, match=f"^{path}: {message}"):
            events.load("folder", timesteps=3, data_dir=folder)

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    @pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
    def test_spoilt_arrays(self, tmp_path, suffix, how):
        path = tmp_path / f"a{suffix}"
        found = np.zeros(100, EVENT)
        if suffix == ".npy":
            np.save(path, found)
        else:
            np.savez(path, **{name: found[name] for name in EVENT.names})
        spoil(path, how)
        with pytest.raises(RecordingError, match=f"^{path}: the file cannot be read, it is truncated or corrupt"):
            recordings.read(path)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"t": [1], "x": [1], "y": [1]}, r"events have the arrays .*Missing: \['p'\]"),
            ({"t": [1], "x": [1, 2], "y": [1], "p": [0]}, "each event has one of each"),
            ({"t": [1], "x": [1.5], "y": [1], "p": [0]}, "x has values that are not whole numbers"),
            ({"t": [np.nan], "x": [1], "y": [1], "p": [0]}, "t has values that are not finite numbers"),
            ({"t": ["now"], "x": [1], "y": [1], "p": [0]}, "t has values that are not finite numbers"),
        ],
    )
    def test_arrays_that_are_not_events(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(RecordingError, match=message):
            recordings.read(tmp_path / "a.npz")

    def test_columns_that_are_not_events(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((5, 3)))
        with pytest.raises(RecordingError, match=r"the columns \('t', 'x', 'y', 'p'\). Received shape \(5, 3\)"):
            recordings.read(tmp_path / "a.npy")

    def test_unknown_suffix(self):
        with pytest.raises(ValueError, match=r"ends in one of \['.aedat', .*\]. Received 'a.raw'"):
            recordings.read(Path("a.raw"))

    @pytest.mark.parametrize(
        ("event", "message"),
        [
            ((0, 5, 0, 0), r"x must be in 0\.\.4. Received 0\.\.5"),
            ((0, 0, -1, 0), r"y must be in 0\.\.3. Received -1\.\.0"),
            ((0, 0, 0, 2), r"p must be in 0\.\.1. Received 0\.\.2"),
        ],
    )
    def test_events_outside_of_the_sensor(self, event, message):
        with pytest.raises(RecordingError, match=message):
            recordings.integrate(np.array([(0, 0, 0, 0), event], EVENT), 1, (4, 5, 2))

    def test_fewer_events_than_slices(self, own_nmnist):
        path = sorted((own_nmnist / "NMNIST" / "Train" / "0").iterdir())[0]
        path.write_bytes(path.read_bytes()[: 5 * 9])
        with pytest.raises(RecordingError, match=f"^{path}: 9 events are too few for 10 slices by number"):
            events.load("nmnist", timesteps=10, data_dir=own_nmnist)
        # By time, slices may be empty.
        events.load("nmnist", timesteps=10, data_dir=own_nmnist, slicing="time")

    def test_spoilt_recordings_are_left_out_only_if_asked_and_never_silently(self, own_nmnist):
        whole = events.load("nmnist", timesteps=3, data_dir=own_nmnist)
        spoilt = [sorted((own_nmnist / "NMNIST" / part / "4").iterdir())[1] for part in ("Train", "Test")]
        for path in spoilt:
            spoil(path, "truncated")
        settings = {"timesteps": 3, "data_dir": own_nmnist, "skip_corrupt": True}
        # The second time from disk.
        for _ in range(2):
            with pytest.warns(UserWarning, match=f"2 recordings are left out:\n{spoilt[0]}.*\n{spoilt[1]}") as warned:
                data = events.load("nmnist", **settings)
            assert warned[0].filename == __file__
        assert sum(map(len, (data.train, data.validation, data.test))) == 58
        assert len(data.test) == 19
        np.testing.assert_array_equal(data.test.x, np.delete(whole.test.x, 9, axis=0))
        np.testing.assert_array_equal(data.test.labels, np.delete(whole.test.labels, 9))

    def test_a_class_must_have_a_usable_recording(self, own_nmnist):
        for path in (own_nmnist / "NMNIST" / "Test" / "4").iterdir():
            spoil(path, "truncated")
        with pytest.raises(ValueError, match=r"The usable test part in .* has none of \['4'\]"):
            events.load("nmnist", timesteps=3, data_dir=own_nmnist, skip_corrupt=True)

    def test_empty_and_missing_class_folders(self, own_nmnist):
        place = own_nmnist / "NMNIST" / "Train" / "6"
        for path in place.iterdir():
            path.unlink()
        message = rf"Each class has a folder with recordings \(\.bin\). {place} has none"
        with pytest.raises(ValueError, match=message):
            events.load("nmnist", timesteps=3, data_dir=own_nmnist)
        place.rmdir()
        with pytest.raises(ValueError, match=message):
            events.load("nmnist", timesteps=3, data_dir=own_nmnist)

    def test_folders_that_are_not_laid_out_as_they_should(self, own_nmnist):
        root = own_nmnist / "NMNIST"
        (root / "Valid").mkdir()
        with pytest.raises(ValueError, match="has folders train and test and no others"):
            events.load("folder", timesteps=3, data_dir=root)
        (root / "Valid").rmdir()
        (root / "Train" / "ten").mkdir()
        with pytest.raises(ValueError, match="train and test have the same classes"):
            events.load("folder", timesteps=3, data_dir=root)
        shutil.rmtree(root / "Test")
        with pytest.raises(ValueError, match=r"both train and test, or neither. .* has \['train'\]"):
            events.load("folder", timesteps=3, data_dir=root)
        (root / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"The data set 'folder' is not at .*empty"):
            events.load("folder", timesteps=3, data_dir=root / "empty")

    def test_a_class_of_one_cannot_be_cut(self, nmnist, tmp_path):
        shutil.copytree(nmnist / "NMNIST" / "Train" / "0", tmp_path / "own" / "zero")
        (tmp_path / "own" / "one").mkdir()
        shutil.copy(next((nmnist / "NMNIST" / "Train" / "1").iterdir()), tmp_path / "own" / "one")
        with pytest.raises(ValueError, match="Class 'one' has 1 recordings, of which 1 are to be set aside"):
            events.load("folder", timesteps=3, data_dir=tmp_path / "own")

    @pytest.mark.parametrize(
        ("file_name", "message"),
        [("11.npy", r"Labels are in 0\.\.10. .*11\.npy has 11"), ("clap.npy", "called by their label, .*clap.npy")],
    )
    def test_gestures_with_other_labels(self, tmp_path, file_name, message):
        for part in ("ibmGestureTrain", "ibmGestureTest"):
            folder = tmp_path / part / "user01_led"
            folder.mkdir(parents=True)
            for label in range(11):
                np.save(folder / f"{label}.npy", np.zeros((10, 4), int))
        np.save(folder / file_name, np.zeros((10, 4), int))
        with pytest.raises(ValueError, match=message):
            events.load("dvs_gesture", timesteps=1, data_dir=tmp_path, validation=0)


def test_slices_by_time_do_not_depend_on_the_unit_of_time():
    fields = [("t", "f8"), ("x", "i8"), ("y", "i8"), ("p", "i8")]
    events_ = np.zeros(100, fields)
    events_["t"] = np.arange(100) * 0.003  # seconds, less than one in all
    events_["x"] = np.arange(100) % 4
    frames = recordings.integrate(events_, 10, (1, 4, 2), "time")
    events_["t"] *= 2.0**20
    np.testing.assert_array_equal(recordings.integrate(events_, 10, (1, 4, 2), "time"), frames)
    counts = frames.sum(axis=(1, 2, 3))
    assert counts.sum() == 100
    assert 9 <= counts.min() <= counts.max() <= 11
