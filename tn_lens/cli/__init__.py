"""The command line: `tn-lens --help`."""

from tn_lens.cli.main import main as main
