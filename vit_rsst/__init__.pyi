from vit_rsst.library.functions import prune as prune

__version__: str
__all__: list[str]
