"""Preparation of data sets, from small archives made in the official format."""

import hashlib
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from tasks.data import cifar10

ROOT = Path(__file__).parent.parent


def made_archive(folder: Path) -> tuple[Path, type[CIFAR10], dict[str, np.ndarray]]:
    """An archive like cifar-10-python.tar.gz with 3 images a batch, and torchvision's reader for it."""
    rng = np.random.default_rng(0)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    images, labels, sums = {}, {}, {}
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        images[name] = rng.integers(256, size=(3, 3072), dtype=np.uint8)  # channel by channel
        labels[name] = rng.integers(10, size=3).tolist()
        content = pickle.dumps({"data": images[name], "labels": labels[name]})
        (inside / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    names = pickle.dumps({"label_names": [str(label) for label in range(10)]})
    (inside / "batches.meta").write_bytes(names)
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, arcname=inside.name)

    class Made(CIFAR10):
        tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        train_list = [[name, sums[name]] for name in sums if name != "test_batch"]
        test_list = [["test_batch", sums["test_batch"]]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(names).hexdigest()}

    train = [name for name in images if name != "test_batch"]
    expected = {
        "train_x": np.concatenate([images[name] for name in train])
        .reshape(-1, 3, 32, 32)
        .transpose(0, 2, 3, 1),
        "train_y": np.concatenate([labels[name] for name in train]),
        "test_x": images["test_batch"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
        "test_y": np.array(labels["test_batch"]),
    }
    return archive, Made, expected


def test_an_archive_becomes_the_prepared_form_once(tmp_path: Path) -> None:
    archive, source, expected = made_archive(tmp_path)
    data = tmp_path / "data"
    assert "15 images for training, 3 for testing" in cifar10.prepare(data, archive, source)
    assert cifar10.check(data) == 15
    images = cifar10.read(data)
    for key, values in expected.items():
        assert np.array_equal(getattr(images, key), values)
        assert getattr(images, key).dtype == np.uint8
    assert [entry.name for entry in (data / "cifar10").iterdir()] == ["cifar10.npz"]
    before = cifar10.path(data).stat().st_mtime_ns
    archive.unlink()
    assert "there already" in cifar10.prepare(data, archive, source)
    assert cifar10.path(data).stat().st_mtime_ns == before


@pytest.mark.parametrize("torn", [True, False])
def test_a_torn_or_other_archive_is_refused_and_leaves_nothing(tmp_path: Path, torn: bool) -> None:
    archive, source, _ = made_archive(tmp_path)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2] if torn else content + b"x")
    with pytest.raises(ValueError, match=r"expected cifar-10-python\.tar\.gz with MD5"):
        cifar10.prepare(tmp_path / "data", archive, source)
    assert not (tmp_path / "data").exists()


def test_an_interrupted_conversion_leaves_no_half_made_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, source, _ = made_archive(tmp_path)

    def torn(file: Path, **arrays: np.ndarray) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", torn)
    with pytest.raises(KeyboardInterrupt):
        cifar10.prepare(tmp_path / "data", archive, source)
    assert list((tmp_path / "data" / "cifar10").iterdir()) == []


def test_the_script_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"no archive")
    words = ["./prepare_dataset.sh", "cifar10", "--from", str(archive), "--data", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"prepare_dataset.sh: {archive}: expected cifar-10-python.tar.gz with MD5")
    assert len(done.stderr.splitlines()) == 1
