"""Generation with a trained model: sampling, the engine, and conversations."""

from inference.engine import Completion, Engine, Piece, PromptCache, generate_ids
from inference.sampling import SamplingSettings
from inference.session import ChatSession, Reply

__all__ = [
    "ChatSession",
    "Completion",
    "Engine",
    "Piece",
    "PromptCache",
    "Reply",
    "SamplingSettings",
    "generate_ids",
]
