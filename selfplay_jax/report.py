"""What a run did, for a person: a line per round, a table per run, a page with curves; runs side by side.

python -m selfplay_jax.report DIR               prints DIR's table and writes DIR/report.html
python -m selfplay_jax.report DIR DIR ...       compares runs and writes comparison.html
"""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from selfplay_jax import metrics, stores
from selfplay_jax.errors import UserError
from selfplay_jax.progress import say
from selfplay_jax.report_data import load
from selfplay_jax.report_tables import LINE_WIDTH, round_line, run_cells, table, text_table

__all__ = ["LINE_WIDTH", "main", "round_line", "table", "write_html"]


def write_html(workdir: epath.PathLike, output: epath.PathLike | None = None) -> epath.Path:
    """Writes the run's page, by default WORKDIR/report.html: one file that loads nothing else.

    Raises:
      UserError: `workdir` is not a run's directory, or the disk is full.
    """
    from selfplay_jax import report_page  # brings in matplotlib

    run = load(workdir)
    file = stores.open_path(output) if output else epath.Path(workdir) / "report.html"
    metrics.write_text(file, report_page.run_page(run))
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m selfplay_jax.report", description=__doc__.split("\n")[0])
    parser.add_argument("workdir", nargs="+", help="the --workdir of a run; several are compared")
    parser.add_argument("--output", help="where the page goes (default: DIR/report.html, or comparison.html)")
    args = parser.parse_args(argv)
    try:
        if len(args.workdir) == 1:
            say(table(args.workdir[0]))
            file = write_html(args.workdir[0], args.output)
        else:
            from selfplay_jax import report_page

            runs = [load(workdir) for workdir in args.workdir]
            say(text_table(*run_cells(runs)))
            file = stores.open_path(args.output or "comparison.html")
            metrics.write_text(file, report_page.comparison_page(runs))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\nwrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
