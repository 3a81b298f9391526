"""The page of ``curate``: pictures of what was decided, in one file without network."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from ssl_lightning.drawing import data_uri

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.group { display: flex; flex-wrap: wrap; gap: .75rem }
figure { margin: 0; padding: .4rem; border: 1px solid #ddd; border-radius: 6px; max-width: 15.5rem }
figure img { max-width: 7rem; margin-right: .25rem; image-rendering: pixelated; vertical-align: top }
figcaption { font-size: .75rem; overflow-wrap: anywhere; color: #555 }
</style></head><body>
<h1>{{ title }}</h1>
{% for group in groups %}<h2>{{ group.title }}</h2>
{% if not group.rows %}<p>None.</p>{% endif %}
<div class="group">{% for row in group.rows %}<figure>
{% for image in row.images %}<img src="{{ image.source }}" alt="{{ image.path }}" title="{{ image.path }}">{% endfor %}
<figcaption>{% if row.caption %}{{ row.caption }} &middot; {% endif %}
{{ row.images | map(attribute="path") | join(" &harr; " | safe) }}</figcaption>
</figure>{% endfor %}</div>
{% endfor %}</body></html>
"""


class Group(NamedTuple):
    """A part of the page."""

    title: str
    rows: list[tuple[list[int], str]]
    """For each figure the images that it shows next to each other, and its caption."""


def page_of(
    title: str, groups: list[Group], thumbnail: Callable[[int], Image.Image], path: Callable[[int], str]
) -> str:
    """The page as HTML.

    Args:
        title: Its title.
        groups: Its parts.
        thumbnail: Draws an image.
        path: The path of an image.
    """
    import jinja2

    def image(place: int) -> dict[str, str]:
        source = data_uri(thumbnail(place), "JPEG")
        return {"source": source, "path": path(place).encode(errors="replace").decode()}

    shown = [
        {
            "title": group.title,
            "rows": [{"images": [*map(image, places)], "caption": caption} for places, caption in group.rows],
        }
        for group in groups
    ]
    return jinja2.Environment(autoescape=True).from_string(_TEMPLATE).render(title=title, groups=shown)
