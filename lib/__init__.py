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
    adapters      config                                 bottleneck modules and their places
    adapterhub    adapters config                        ... in files
    peft_methods  config                                 LoRA and friends
    adaptation    adapterhub adapters config modeling peft_methods
    checkpoint  adaptation config training
    run         cli config data evaluation labels modeling report runtime sources training
    model_card  embedded                                 README.md of an exported model

    predict_config      config                           options of predict.py
    inputs              config predict_config            new text, row by row
    inference           batching config inputs runtime   rows to answers, on all processes
    embeddings          inference inputs predict_config
    question_answering  batching config inference inputs predict_config
    generation          config inference inputs predict_config
    pipelines           config generation inference inputs modeling predict_config
    tasks               adaptation cli config data embeddings generation inference inputs modeling pipelines
                        predict_config question_answering run
    outputs             config inference inputs report   answers to files
    tokens              report
    onnx_export         config
"""
