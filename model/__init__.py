"""The model and what is saved with it: `from model import SmartHaoAI, HaoAIConfig, BPETokenizer`."""

from typing import TYPE_CHECKING

from model.lazy import lazily

if TYPE_CHECKING:
    from model.attention import RMSNorm, RotaryEmbedding, SmartAttention
    from model.cache import KVCache
    from model.config import HaoAIConfig
    from model.feedforward import MixtureOfExperts, SmartFeedForward
    from model.output import ModelOutput
    from model.reasoning import ReasoningModule
    from model.reward import RewardModel
    from model.tokenizer import BPETokenizer
    from model.transformer import SmartHaoAI, SmartTransformerBlock

__all__ = [
    "BPETokenizer",
    "HaoAIConfig",
    "KVCache",
    "MixtureOfExperts",
    "ModelOutput",
    "RMSNorm",
    "ReasoningModule",
    "RewardModel",
    "RotaryEmbedding",
    "SmartAttention",
    "SmartFeedForward",
    "SmartHaoAI",
    "SmartTransformerBlock",
]

__getattr__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
