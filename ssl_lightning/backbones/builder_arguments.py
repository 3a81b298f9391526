"""What the builders of this package's networks take of what timm gives them."""

from typing import Any

from ssl_lightning.errors import UserError


def builder_arguments(subject: str, pretrained: bool, **kwargs: Any) -> dict[str, Any]:
    """What a network of this package takes of what timm gives to all builders of its networks.

    Args:
        subject: Network and verb that begin the message.
        pretrained: Whether weights are asked for.
        kwargs: Other arguments of the builder.

    Raises:
        UserError: There are no pretrained weights.
    """
    if pretrained:
        raise UserError(f"{subject} no pretrained weights; leave out pretrained.")
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {name: value for name, value in kwargs.items() if name not in of_timm}
