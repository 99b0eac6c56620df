"""The parts that the scripts wire together. Who imports whom, asserted by tests/test_architecture.py:

    config      nothing                       options and UserError
    catalog     nothing                       table of known data sets
    metrics/    nothing                       loaded by path through `evaluate`
    batching    nothing                       which samples form which step
    runtime     config                        the machine
    optim       config
    embedded    config                        minilm and movie_reviews
    labels      config
    modeling    config embedded
    data        config batching catalog embedded labels
    training    config batching data optim runtime
    evaluation  config batching data
    report      data evaluation
    tracking    config data evaluation report
    progress    batching
    checkpoint  config training
    run         config data evaluation labels modeling runtime training
"""
