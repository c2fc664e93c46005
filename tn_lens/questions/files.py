"""Read question files (CSV, JSON, JSON lines, Parquet) and download data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput

Rows = list[dict[str, Any]]


def read_csv(path: Path, header: list[str] | None = None) -> Rows:
    """Read a CSV file; its first line is the header unless one is given.

    Raises:
        BadInput: the file is not UTF-8 CSV, or the number of fields of a line differs from the header.
    """
    try:
        # "utf-8-sig" skips the byte order mark that spreadsheets write
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header = header or [name.strip() for name in next(lines, [])]
            numbered = [(lines.line_num, fields) for fields in lines if any(fields)]  # without empty lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as a UTF-8 CSV file with a header line: {error}") from error
    if not any(header):
        raise BadInput(f"{path} cannot be read as a CSV file with a header line: it is empty")
    # zip would drop the fields that have no column
    for line, fields in numbered:
        if len(fields) != len(header):
            too_many = len(fields) > len(header)
            advice = "put double quotes around fields with commas" if too_many else "add the missing fields"
            raise BadInput(
                f"{path}, line {line}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}; {advice}"
            )
    rows: Rows = [dict(zip(header, fields, strict=True)) for _, fields in numbered]
    return rows or [dict.fromkeys(header)]  # without rows, a row of None conveys the columns


def read_json_lines(path: Path) -> Rows:
    """Read a file with one JSON object per line.

    Raises:
        BadInput: the file cannot be read, or a line is not a JSON object.
    """
    rows = []
    try:
        # str.splitlines would also split at U+2028, which JSON strings may contain
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
                rows.append(row)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON lines: {error}") from error
    return rows


def read_parquet(path: Path) -> Rows:
    """Read a Parquet file.

    Raises:
        BadInput: the file cannot be read.
    """
    import pandas as pd

    try:
        rows: Any = pd.read_parquet(path).to_dict("records")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as Parquet: {error}") from error
    return rows


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON: {error}") from error


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".csv": read_csv,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
"""Functions that read the rows of a file, by file extension."""


def download(url: str, advice: str) -> Path:
    """Download a file into the cache of `datasets`, unless it is already cached.

    Raises:
        BadInput: the file cannot be downloaded; the message ends with `advice`.
    """
    import datasets

    try:
        return Path(str(datasets.DownloadManager().download(url)))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot download {url} ({type(error).__name__}: {str(error)[:200]}); {advice}") from error


def load_from_hub(name: str, config: str | None, split: str, advice: str) -> Rows:
    """Load the rows of a dataset from the Hugging Face hub.

    Raises:
        BadInput: the dataset cannot be downloaded; the message ends with `advice`.
    """
    import datasets  # imported here, since the import takes seconds
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(name, config, split=split)
        return list(rows)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"cannot download {name} from the hub ({type(error).__name__}: {reason}); {advice}") from error
