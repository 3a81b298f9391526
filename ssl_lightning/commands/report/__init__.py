"""The command ``report``: everything about a run on one page."""

from collections.abc import Sequence
from pathlib import Path

from ssl_lightning.arguments import SSLArgumentParser
from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.commands.report.history import History
from ssl_lightning.commands.report.page import page_of
from ssl_lightning.commands.report.server import serve
from ssl_lightning.errors import UserError
from ssl_lightning.runs import newest_run

__all__ = ["report", "run", "watch"]


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``report``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning report", description="Make a page of a run: one file, no network.")
    parser.add_argument("run", type=str, help="Folder of a run, or of its versions (takes the newest).")
    parser.add_argument("--output", type=str, default="report.html", help="HTML file to write.")
    parser.add_argument(
        "--watch", action="store_true", help="Serve the page on this machine instead, updated while the run trains."
    )
    parser.add_argument("--port", type=int, default=0, help="Port for --watch; 0 picks a free port.")
    options = parser.parse_args(list(words))
    if options.watch:
        watch(options.run, options.port)
    else:
        print(report(options.run, options.output))


def report(run: str, output: str = "report.html") -> Path:
    """Write a run as one HTML file that needs no other file and no network.

    Args:
        run: Folder of a run, or the folder of its versions for the newest.
        output: The page to write.

    Returns:
        Its path.

    Raises:
        UserError: There is no such run, or it has logged nothing yet.
    """
    target, folder = Path(output), newest_run(run)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--output {output}: name a file in a folder that exists, e.g. report.html.")
    history = History.of(folder)
    if not history.run.metrics:
        raise UserError(
            f"{folder} has no metrics yet: wait for its first logged step (trainer.log_every_n_steps), or let "
            "--watch wait for it; a run with --trainer.logger false writes none."
        )
    page = page_of(history)
    try:
        with replacing(target) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}); choose another --output.") from error
    return target


def watch(run: str, port: int = 0) -> None:
    """Serve the page of a run on this machine only, until Ctrl-C; it updates while the run trains.

    Args:
        run: Folder of a run, or the folder of its versions for the newest.
        port: Port; 0 picks a free port.

    Raises:
        UserError: There is no such run, or the port is taken.
    """
    folder = newest_run(run)
    serve(folder, port)
