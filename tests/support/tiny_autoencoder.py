"""A model that is quick to convert and to run."""

from __future__ import annotations

from pathlib import Path

from weightport import AutoencoderTiny


def write_tiny_autoencoder(folder: Path) -> Path:
    """Write an `AutoencoderTiny` of one block a half, with random weights; returns its folder."""
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return folder
