"""More negatives than the batch has: embeddings of past batches, and embeddings made from the batch's own."""

from goal.candidates.augment import Augmented, Made, interpolate, mixup
from goal.candidates.bank import Bank, Banked
from goal.candidates.two_way import TwoWay

__all__ = ["Augmented", "Bank", "Banked", "Made", "TwoWay", "interpolate", "mixup"]
