"""Read the files that questions come in: CSV, JSON, JSON lines, Parquet, and public addresses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput


def read_csv(path: Path, header: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows by column name; every line must have as many fields as the header, which is the first line unless given.

    Raises:
        BadInput: the file is not UTF-8 CSV, or a line has another number of fields; the line is named.
    """
    rows = []
    named = header is not None
    header = list(header or [])
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            if not named:
                header = [name.strip() for name in next(lines, [])]
            for fields in lines:
                if any(fields) and len(fields) != len(header):
                    raise BadInput(
                        f"{path}, line {lines.line_num}: expected {len(header)} fields ({', '.join(header)}), got "
                        f"{len(fields)}; "
                        + (
                            "put double quotes around a field that holds a comma"
                            if len(fields) > len(header)
                            else "every line needs them all"
                        )
                    )
                if any(fields):
                    rows.append(dict(zip(header, fields, strict=True)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as a UTF-8 CSV file with a header line: {error}") from error
    if not any(header):
        raise BadInput(f"{path} cannot be read as a CSV file with a header line: it is empty")
    return rows or [dict.fromkeys(header)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line.

    Raises:
        BadInput: a line is something else; it is named.
    """
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
                rows.append(row)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON lines: {error}") from error
    return rows


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        BadInput: it is not one.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON: {error}") from error


def download(url: str, instead: str) -> Path:
    """Fetch a file once into the cache of `datasets`.

    Raises:
        BadInput: it cannot be fetched; `instead` says what to do.
    """
    import datasets

    try:
        return Path(str(datasets.DownloadManager().download(url)))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot fetch {url} ({type(error).__name__}: {str(error)[:200]}); {instead}") from error


def load_from_hub(name: str, config: str | None, split: str, instead: str) -> list[dict[str, Any]]:
    """The rows of a data set on the hub.

    Raises:
        BadInput: it cannot be fetched; `instead` says what to do.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(name, config, split=split)
        return list(rows)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"cannot fetch {name} from the hub ({type(error).__name__}: {said}); {instead}") from error
