"""A Parquet file, or the folder of a Hugging Face data set, as rows; needs `datasets`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from rr1.files import write_bytes


class Rows(Sequence):
    """The rows of the split `train`, or of the only one, as dicts.

    Pictures that stand in the rows are written to NAME.pictures in the image folder, each once;
    the rows then hold their paths.
    """

    def __init__(self, path: Path, folder: Path):
        try:
            import datasets
        except ImportError:
            raise SystemExit(f"--data {path}: reading this needs `pip install datasets`") from None
        try:
            if path.is_file():
                found = datasets.load_dataset("parquet", data_files=str(path))
            elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path))
        except Exception as error:  # `datasets` has many
            raise SystemExit(f"--data {path}: cannot be read as a data set: {error}") from None
        if isinstance(found, dict):
            found = found.get("train") or next(iter(found.values()))
        self.table = found.with_format("arrow")  # pictures stay as they are: bytes and path
        self.folder, self.name = folder, f"{path.name}.pictures"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        [row] = self.table[i].to_pylist()
        for key in {"image", "images", "clean_image"} & row.keys():
            if isinstance(row[key], list):
                row[key] = [self._as_path(picture) for picture in row[key]]
            else:
                row[key] = self._as_path(row[key])
        return row

    def _as_path(self, picture: str | dict | None) -> str | None:
        if not isinstance(picture, dict):
            return picture
        content, path = picture["bytes"], picture["path"] or ""
        if content is None:
            return path
        path = f"{self.name}/{hashlib.sha256(content).hexdigest()[:20]}{Path(path).suffix}"
        if not (self.folder / path).exists():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / path, content)
        return path
