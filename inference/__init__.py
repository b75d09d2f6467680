"""Generation with a trained model: sampling, the engine, and conversations."""

from typing import TYPE_CHECKING

from model.lazy import lazily

if TYPE_CHECKING:
    from inference.batching import Batcher, QueueFull, Request, RequestFailed
    from inference.engine import Completion, Engine, Piece, PromptCache, generate_ids
    from inference.grammar import Grammar
    from inference.memory import ConversationMemory, Memory
    from inference.prompts import PromptTemplate, SmartPromptEngineer
    from inference.reasoning import MultiStepReasoning, ReasoningResult, generate_with_reasoning
    from inference.sampling import SamplingSettings
    from inference.session import ChatSession, Reply

__all__ = [
    "Batcher",
    "ChatSession",
    "Completion",
    "ConversationMemory",
    "Engine",
    "Grammar",
    "Memory",
    "MultiStepReasoning",
    "Piece",
    "PromptCache",
    "PromptTemplate",
    "QueueFull",
    "ReasoningResult",
    "Reply",
    "Request",
    "RequestFailed",
    "SamplingSettings",
    "SmartPromptEngineer",
    "generate_ids",
    "generate_with_reasoning",
]

__getattr__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
