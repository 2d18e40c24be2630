"""What every U-Net here has in common: which layers it has, in what order, and how wide they are."""

from typing import NamedTuple


class Place(NamedTuple):
    """One layer of a U-Net."""

    name: str  # that of released checkpoints, such as 16x16_block0
    kind: str  # conv (the first layer), down, block; in0 and in1 (the bottom), up
    resolution: int  # of its output
    cin: int
    cout: int
    last: bool  # the last block of its decoder level


MAX_BLOCKS = 1000  # of the encoder; a config may ask for any number


def unet_plan(
    img_resolution: int, in_channels: int, first: int, widths: list[int], num_blocks: int
) -> tuple[list[Place], list[Place]]:
    """The layers of the encoder, each of which leaves a skip connection, and of the decoder, where each ``block`` takes one.

    Args:
        first: channels after the first convolution.
        widths: channels of each level, from the full resolution down; each level halves the resolution.

    Raises:
        ValueError: more blocks than any network has.
    """
    if len(widths) * (num_blocks + 1) > MAX_BLOCKS:
        raise ValueError(f"{len(widths)} levels of {num_blocks} blocks are more than {MAX_BLOCKS} in all")
    encoder, cout = [], first
    for level, width in enumerate(widths):
        res = img_resolution >> level
        kind, cin = ("down", cout) if level else ("conv", in_channels)
        encoder.append(Place(f"{res}x{res}_{kind}", kind, res, cin, cout, False))
        for i in range(num_blocks):
            cin, cout = cout, width
            encoder.append(Place(f"{res}x{res}_block{i}", "block", res, cin, cout, False))

    decoder, skips = [], [place.cout for place in encoder]
    for level, width in reversed(list(enumerate(widths))):
        res = img_resolution >> level
        for kind in ("in0", "in1") if level == len(widths) - 1 else ("up",):
            decoder.append(Place(f"{res}x{res}_{kind}", kind, res, cout, cout, False))
        for i in range(num_blocks + 1):
            cin, cout = cout + skips.pop(), width
            decoder.append(Place(f"{res}x{res}_block{i}", "block", res, cin, cout, i == num_blocks))
    return encoder, decoder
