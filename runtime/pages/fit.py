from dataclasses import dataclass
from typing import Literal
from pagemill.pages.source import load_page
from pagemill.pages.ink import PageInk
Resolution = Literal["auto","full"]|int
@dataclass(frozen=True)
class FitOptions:
    resolution: Resolution="auto"; crop: bool=False; preferred_height: float|None=None
def fit_page(ref,dpi,options,processor):
    return processor.prepare(load_page(ref,dpi)), PageInk()
