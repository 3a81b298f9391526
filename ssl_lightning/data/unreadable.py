"""Count and list the images that cannot be read."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.data.images import Unreadable
from ssl_lightning.errors import UserError


def report_unreadable(
    known: dict[str, str], unreadable: Sequence[Unreadable], total: int, listing: Path, limit: float
) -> None:
    """Count and list unreadable images, and stop the run if they are too many.

    Args:
        known: Name and reason of each unreadable image so far; the new ones are added.
        unreadable: The unreadable images of a batch.
        total: Number of different images that this process has seen by the end of the epoch.
        listing: The file that lists them.
        limit: Fraction of the images that may be unreadable.

    Raises:
        UserError: There are more.
    """
    new = {name: reason for name, reason in unreadable if name not in known}
    if not new:
        return
    known.update(new)
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\t{reason}\n" for name, reason in sorted(known.items())), encoding="utf-8")
    share = len(known) / total
    rank_zero_warn(f"{len(known)} of {total} images are unreadable and skipped; see {listing}")
    if share > limit:
        raise UserError(
            f"{share:.1%} of the images are unreadable, more than --data.max_unreadable={limit:.1%}; "
            f"fix or remove the files listed in {listing}, or raise the limit."
        )
