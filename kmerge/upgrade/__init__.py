"""Files of any age in the words of current Keras: the same function, its weights read as current Keras stores them.

    part        what the rules work on: a layer with its weights
    settings    settings of current Keras's layers, and old values spelled anew
    keras1      Keras 1 to Keras 2
    recurrent, local, layers    what each class becomes
    operations  TensorFlow's operations that tf.keras recorded as layers
    slots       where current Keras stores the weights of a layer
    network     a whole graph
    refusals    what current Keras makes of an old file
    training    losses, metrics, optimizer
    whole       a source to a source
    optimizer   the optimizer's state

No framework is imported, no code of a file is run, and no weight is read before the file is written.
"""

from kmerge.upgrade.part import Obstacle
from kmerge.upgrade.refusals import Refusal, is_outdated, refusals
from kmerge.upgrade.whole import Upgraded, alone, as_legacy, is_current, upgrade

__all__ = ["Obstacle", "Refusal", "Upgraded", "alone", "as_legacy", "is_current", "is_outdated", "refusals", "upgrade"]
