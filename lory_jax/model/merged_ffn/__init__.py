from lory_jax.model.merged_ffn.blocks import whole_products, block_products
from lory_jax.model.merged_ffn.reference import *
from lory_jax.model.merged_ffn.vjp import products_ffn
def merged_ffn(x_SxTxD, experts, r_SxE, implementation="whole"):
    experts = {name: experts[name] for name in ("gate", "up", "down")}
    if implementation == "einsum":
        return einsum_ffn(x_SxTxD, experts, r_SxE)
    return products_ffn({"whole": whole_products, "blocks": block_products}[implementation](), x_SxTxD, experts, r_SxE)
