"""The models of the literature's retrieval systems, which compute x and y, or S, for the objectives."""

from goal.models.audio_visual import AudioVisual
from goal.models.cross_attention import SCAN, CrossAttention, hard_negatives, matching_pairs
from goal.models.image import Projection, RegionImage
from goal.models.joint import SETTINGS, Joint, Published, rvse_pp, vse_infinity, vse_pp
from goal.models.pooling import GPO
from goal.models.text import GRUText, TokenText, Vocabulary, WordStates

__all__ = [
    "GPO",
    "SCAN",
    "SETTINGS",
    "AudioVisual",
    "CrossAttention",
    "GRUText",
    "Joint",
    "Projection",
    "Published",
    "RegionImage",
    "TokenText",
    "Vocabulary",
    "WordStates",
    "hard_negatives",
    "matching_pairs",
    "rvse_pp",
    "vse_infinity",
    "vse_pp",
]
