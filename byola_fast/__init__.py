"""Fast BYOL-A augmentation for log-mel spectrograms, and a compact BYOL-A trainer.

    audio files -> wav -> log-mel -> pre-norm -> mixup -> resize-crop (-> fader) -> post-norm
                -> encoder -> BYOL loss -> EMA

``augment(lms)`` makes two views of a batch in one call. ``Augment`` adds the memory of past inputs. ``ops`` has the
single steps. ``pretrain`` trains an encoder, ``load_encoder`` loads one. Importing needs torch alone.
"""

import byola_fast.runtime.interrupts  # noqa: F401  # first: Ctrl-C may come during the others
from byola_fast import ops
from byola_fast.audio.reading import read_audio
from byola_fast.doctor import doctor
from byola_fast.embedding.embedder import Embedder, FrameEmbeddings, load_encoder
from byola_fast.embedding.export import export_encoder
from byola_fast.embedding.standardize import standardize
from byola_fast.networks.ema import EMA, CosineDecay
from byola_fast.networks.encoder_file import describe_encoder, save_encoder
from byola_fast.networks.encoders import AudioNTT2020, AudioNTT2022, make_encoder
from byola_fast.objectives.byol import BYOL
from byola_fast.objectives.learner import Learner
from byola_fast.objectives.registry import make_learner
from byola_fast.spectrograms.log_mel import LogMel
from byola_fast.spectrograms.statistics import RunningStats
from byola_fast.training.config import PretrainConfig
from byola_fast.training.pretrain import PretrainResult, pretrain
from byola_fast.views.augment import Augment, augment
from byola_fast.views.memory_bank import MemoryBank
from byola_fast.views.params import AugmentParams

__version__ = "0.1.0"

__all__ = [
    "BYOL",
    "EMA",
    "AudioNTT2020",
    "AudioNTT2022",
    "Augment",
    "AugmentParams",
    "CosineDecay",
    "Embedder",
    "FrameEmbeddings",
    "Learner",
    "LogMel",
    "MemoryBank",
    "PretrainConfig",
    "PretrainResult",
    "RunningStats",
    "augment",
    "describe_encoder",
    "doctor",
    "export_encoder",
    "load_encoder",
    "make_encoder",
    "make_learner",
    "ops",
    "pretrain",
    "read_audio",
    "save_encoder",
    "standardize",
]
