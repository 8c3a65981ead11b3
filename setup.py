"""Builds the optional CPU kernels; everything else is in pyproject.toml.

The extension is a plain shared library (C functions, loaded with ctypes), not a Python module. Where there is no
compiler the installation goes on without it.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
spec = spec_from_file_location("sources", ROOT / "clicktrain" / "kernels" / "sources.py")
sources = module_from_spec(spec)
spec.loader.exec_module(sources)

setup(
    ext_modules=[
        Extension(
            "clicktrain.kernels.cpu._kernels",
            [str(path.relative_to(ROOT)) for path in sources.sources()],
            depends=[str(path.relative_to(ROOT)) for path in sources.headers()],
            define_macros=[("CLICKTRAIN_DIGEST", f'"{sources.digest()}"')],
            extra_compile_args=list(sources.FLAGS),
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]
)
