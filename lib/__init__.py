"""The parts that the scripts wire together, in ten wings.

A wing imports only wings to its right. `model` and `data`, and `runtime` and `config`, stand beside each other: one of
a pair may import the other, not both. A test holds this line and sees that no modules import each other in a circle.

    experiments > inference > run > training > evaluation > model, data > hub > runtime, config > errors
"""
