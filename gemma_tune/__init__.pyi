from gemma_tune.api import export as export
from gemma_tune.api import generate as generate
from gemma_tune.api import load_recipe as load_recipe
from gemma_tune.api import merge as merge
from gemma_tune.api import plan as plan
from gemma_tune.api import score as score
from gemma_tune.api import train as train
from gemma_tune.inference.notebook import Gemma as Gemma
from gemma_tune.inference.notebook import load as load

__all__ = ["Gemma", "export", "generate", "load", "load_recipe", "merge", "plan", "score", "train"]
