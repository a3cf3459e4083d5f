"""The format of the released Pixel Reasoner checkpoints, and of every tool that no other format spells.

Source: TIGER-AI-Lab/Pixel-Reasoner, `experience_maker.py` and `data_processor.py` (Qwen-Agent's `NousFnCallPrompt`).
"""

from pixel_jax.dialog.formats.format import CallFormat

PIXEL_REASONER = CallFormat("pixel_reasoner", pad=0.1)
