"""The kinds of layer that can be attributed: one file each, entered by :func:`register_layer`."""

from lightning_source.layers import attention as attention
from lightning_source.layers import conv as conv
from lightning_source.layers import conv_transpose as conv_transpose
from lightning_source.layers import embedding as embedding
from lightning_source.layers import embedding_bag as embedding_bag
from lightning_source.layers import free as free
from lightning_source.layers import functional as functional
from lightning_source.layers import linear as linear
from lightning_source.layers import local as local
from lightning_source.layers import norm as norm
from lightning_source.layers import positions as positions
from lightning_source.layers.contract import Block as Block
from lightning_source.layers.contract import Call as Call
from lightning_source.layers.contract import LayerForm as LayerForm
from lightning_source.layers.forms import MatrixForm as MatrixForm
from lightning_source.layers.forms import VectorForm as VectorForm
from lightning_source.layers.forms import captured_vectors as captured_vectors
from lightning_source.layers.forms import rows_by_example as rows_by_example
from lightning_source.layers.registry import blocks_of as blocks_of
from lightning_source.layers.registry import form_of as form_of
from lightning_source.layers.registry import register_layer as register_layer
from lightning_source.names import clean_name as clean_name

register = register_layer  # its earlier name
