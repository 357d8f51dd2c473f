"""What training minimises: BYOL and contrastive learners around an encoder."""

from byola_fast.objectives.learner import MLP, Learner, Output

__all__ = ["MLP", "Learner", "Output"]
