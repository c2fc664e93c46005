"""Read question files (CSV, JSON, JSON lines, Parquet) and download data sets."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count

Rows = list[dict[str, Any]]


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""The characters that may separate fields, and their names in messages."""
ESCAPED = re.compile(r'\\"(?![A-Za-z{\\])')
"""A quotation mark that is escaped with a backslash, and not an umlaut in LaTeX."""
NOT_DOUBLED = (
    'expected quotation marks inside a quoted field to be doubled, as in "He said ""hi""", got one that is single, escaped with '
    "a backslash or never closed; double it"
)


def read_csv(path: Path, header: list[str] | None = None) -> Rows:
    """Read a CSV file; its first line is the header unless one is given.

    Fields are separated by commas or, if the first line has none, by semicolons, tabs or vertical bars.

    Raises:
        BadInput: the file is not UTF-8 CSV, two columns have the same name, the number of fields of a line differs from the
            header, or quotation marks are escaped with backslashes.
    """
    try:
        # "utf-8-sig" skips the byte order mark that spreadsheets write
        text = path.read_bytes().decode("utf-8-sig")
        first = next(iter(text.splitlines()), "")
        delimiter = "," if "," in first else max(SEPARATORS, key=first.count)
        # strict, because quotation marks inside a quoted field would be dropped otherwise
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            header = header or [name.strip() for name in next(lines, [])]
            numbered = [(lines.line_num, fields) for fields in lines if any(fields)]  # without empty lines
        except csv.Error as error:
            if "expected after" in str(error) or "unexpected end" in str(error):
                raise BadInput(f"{path}, line {lines.line_num}: {NOT_DOUBLED}") from error
            raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as a UTF-8 CSV file with a header line: {error}") from error
    if not any(header):
        raise BadInput(f"{path} cannot be read as a CSV file with a header line: it is empty")
    check_names(header, str(path))
    # zip would drop the fields that have no column
    for line, fields in numbered:
        if len(fields) != len(header):
            too_many = len(fields) > len(header)
            advice = (
                f"put double quotes around fields with {SEPARATORS[delimiter]}"
                if too_many
                else "add the missing fields"
            )
            raise BadInput(
                f"{path}, line {line}: expected {count(len(header), 'field')} ({', '.join(header)}), got {len(fields)}; {advice}"
            )
        # in a quoted field, a backslash before a doubled quotation mark is text
        end = rf"[{re.escape(delimiter)}\r\n]"
        escaped = [re.escape(field) for field in fields if ESCAPED.search(field)]
        if any(re.search(rf"(?:^|{end}) *{field}(?:$|{end})", text) for field in escaped):
            raise BadInput(f"{path}, line {line}: {NOT_DOUBLED}")
    rows: Rows = [dict(zip(header, fields, strict=True)) for _, fields in numbered]
    return rows or [dict.fromkeys(header)]  # without rows, a row of None conveys the columns


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN. The texts "None" and "NaN" are not missing."""
    return value is None or (isinstance(value, float) and value != value)


def check_names(names: Iterable[str], where: str) -> None:
    """Raise an error if two columns have the same name, of which only one could be read. Columns without a name are ignored."""
    repeated = [name for name, n in Counter(names).items() if n > 1 and name]
    if repeated:
        raise BadInput(f"{where}: expected one {repeated[0]!r}, got several of that name; rename or remove the others")


def read_json_lines(path: Path) -> Rows:
    """Read a file with one JSON object per line.

    Raises:
        BadInput: the file cannot be read, or a line is not a JSON object.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON lines: {error}") from error
    # str.splitlines would also split at U+2028, which JSON strings may contain
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}", "JSON lines")
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
            rows.append(row)
    return rows


def read_parquet(path: Path) -> Rows:
    """Read a Parquet file.

    Raises:
        BadInput: the file cannot be read.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as Parquet: {error}") from error
    check_names(map(str, frame.columns), str(path))
    rows: Any = frame.to_dict("records")
    return [{str(name): _cell(value) for name, value in row.items()} for row in rows]


def _cell(value: Any) -> Any:
    """A value of a data frame: None if it is missing, and an int if it is a float without a fraction."""
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    # a column of integers with a missing value is stored as floats
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 JSON: {error}") from error
    return parse_json(text, str(path), "UTF-8 JSON")


def parse_json(text: str, where: str, what: str) -> Any:
    """Parse JSON. NaN becomes None, and numbers with a decimal point are kept as they are written ("1.50").

    Args:
        text: the text.
        where: name of the text in messages.
        what: its format in messages.

    Raises:
        BadInput: the text is not JSON, or an object has two values for a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_names((key for key, _ in pairs), where)
        return dict(pairs)

    def constant(name: str) -> None:
        if name != "NaN":  # pandas writes NaN for a missing value
            raise BadInput(f"{where}: expected {what}, got the value {name}; write a text or a number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=str, parse_constant=constant)
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text:  # the line is in `where`
            reason = f"{error.msg}: column {error.colno}"
        raise BadInput(f"{where} cannot be read as {what}: {reason}") from error


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


def fetch(address: str | Path, checksum: str, version: str) -> Path:
    """Return the path of a published file, which is downloaded if the address is no local file.

    Warns if the file is not the known version.

    Args:
        address: path or URL.
        checksum: SHA-256 of the known version.
        version: name of this version in the warning.

    Raises:
        BadInput: the file does not exist, or cannot be downloaded.
    """
    path, name = Path(address), Path(address).name
    if not path.is_file():
        if "://" not in str(address):
            raise BadInput(f"the file {str(address)!r} does not exist; give the path or the URL of an existing file")
        path = download(str(address), f"download {name} manually and pass its path as the source")
    digest = sha256(path.read_bytes()).hexdigest()
    if digest != checksum:
        warnings.warn(
            f"this {name} is not {version} (SHA-256 {digest[:12]}..., expected {checksum[:12]}...); results may not be "
            "comparable with published ones",
            stacklevel=4,  # the line that calls load_questions
        )
    return path


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
