"""gptlab: a laboratory for pretraining GPT-2 in which every block is judged by the confidence of the next."""

__version__ = "0.1.0"
