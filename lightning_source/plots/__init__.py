"""Pictures: arrays or result objects in, matplotlib axes out. Matplotlib is imported when the first one is drawn.

Every function draws on the axes ``ax=``, or on those of a new figure, and returns them, so that pictures can be put
side by side and changed afterwards.
"""

from lightning_source.plots.distribution import plot_concentration as plot_concentration
from lightning_source.plots.distribution import plot_histogram as plot_histogram
from lightning_source.plots.examples import plot_examples as plot_examples
from lightning_source.plots.measured import plot_further_training as plot_further_training
from lightning_source.plots.measured import plot_lds as plot_lds
from lightning_source.plots.measured import plot_removal as plot_removal
from lightning_source.plots.segments import plot_layer_shares as plot_layer_shares
from lightning_source.plots.segments import plot_segment_shares as plot_segment_shares
from lightning_source.plots.self_influence import plot_self_influence as plot_self_influence
from lightning_source.plots.spectrum import plot_spectrum as plot_spectrum
from lightning_source.plots.tokens import plot_tokens as plot_tokens
