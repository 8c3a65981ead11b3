"""Deployment: a trained model as one fused network that runs wherever it is taken.

`compile` traces a model and makes a `CompiledModel` of it; `CompiledModel.save` and `load` carry it in one file.
See `trace`, `fusion`, `layout` and `program` for the steps from a model to what runs.
"""

from clicktrain.deploy.compiled import CompiledModel, compile, load

__all__ = ["CompiledModel", "compile", "load"]
