"""The parts that the scripts wire together.

Who imports whom, asserted by tests/test_architecture.py:

    config      -                                        options, UserError
    cli         config                                   flags and YAML
    catalog     -                                        table of known data sets
    batching    -                                        which samples form which step
    runtime     config                                   the machine
    optim       config
    embedded    config                                   minilm and movie_reviews
    labels      config
    modeling    config embedded
    sources     catalog config embedded                  data sets as stored
    data        batching config labels sources           data sets as trained on
    training    batching config data optim runtime
    evaluation  batching config data
    report      data evaluation
    tracking    config data evaluation report
    progress    batching
    checkpoint  config training
    run         cli config data evaluation labels modeling report runtime sources training
"""
