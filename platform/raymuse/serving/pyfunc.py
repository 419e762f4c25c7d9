"""A model folder as MLflow's `python_function`: a table of prompts in, a table of pictures out.

MLflow loads it by this module's name (`loader_module` in `MLmodel`): nothing of ours is ever pickled.

    model = mlflow.pyfunc.load_model("models:/raymuse-demo@champion")
    table = model.predict(pandas.DataFrame({"prompt": ["a small red star on a black background"], "seed": [7]}))
"""

import base64
import math
from typing import TYPE_CHECKING, Any

from raymuse.config.sampling import Options
from raymuse.pipeline import Pipeline
from raymuse.storage.pictures import png_bytes

if TYPE_CHECKING:
    import pandas as pd


class PromptModel:
    """What MLflow asks for pictures.

    A row's `seed` is 0 where it gives none; `negative`, `steps` and `guidance` are the model's own.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def predict(self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """Columns `image` (PNG, base64) and `seed`, a row a row."""
        import pandas as pd

        rows = [{name: value for name, value in row.items() if _given(value)} for row in model_input.to_dict("records")]
        requests = []
        for row in rows:
            options: Options = {}
            if "steps" in row:
                options["steps"] = int(row["steps"])
            if "guidance" in row:
                options["guidance"] = float(row["guidance"])
            seed, negative = int(row.get("seed", 0)), str(row.get("negative", ""))
            requests.append(self.pipeline.request(str(row["prompt"]), seed, negative, **options))
        images = []
        for request, picture in zip(requests, self.pipeline.draw(requests), strict=True):
            facts = {"seed": request.seed, "prompt": request.prompt, "negative_prompt": request.negative}
            images.append(base64.b64encode(png_bytes(picture.pixels, facts)).decode())
        return pd.DataFrame({"image": images, "seed": [request.seed for request in requests]})


def _load_pyfunc(path: str) -> PromptModel:
    """Called by MLflow with the folder."""
    return PromptModel(Pipeline.load(path))


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
