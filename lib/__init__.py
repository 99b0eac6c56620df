"""The parts that the scripts wire together.

Who imports whom, asserted by tests/test_architecture.py:

    config      -                                        options, UserError
    redaction   -                                        secrets, left out
    lean        -                                        the libraries without what is not used
    train_config  config                                 options of train.py
    eval_config  config                                  options of eval.py
    cli         config eval_config redaction             flags and YAML
    catalog     -                                        table of known data sets
    problems    -                                        classes, numbers, several labels
    stopping    -                                        signals and the time limit
    watchdog    -                                        who hangs, and where
    manifest    -                                        folders that are whole or absent
    autocast    -                                        casts of mixed precision made once
    batching    stopping                                 which samples form which step
    processes   config stopping                          what processes agree on and add up
    dropout     -                                        its random numbers on a CPU
    attention   -                                        in training on a CPU
    runtime     attention autocast config dropout processes stopping     the machine
    memory      config                                   fewer samples per forward
    optim       config freezing problems processes train_config
    embedded    config                                   minilm and movie_reviews
    labels      config                                   one class a row
    label_sets  config labels                            several labels a row
    targets     config label_sets labels problems        what is learnt of a row
    overrides   config                                   changes to a model's configuration
    freezing    config                                   parts that are not trained
    compilation  config freezing                         layers as one program
    modeling    config embedded endpoint freezing hub_cache hub_files hub_needs modelscope_source overrides problems
    sources     catalog config embedded endpoint hub_cache hub_needs hub_publish lean problems       data sets as stored
    windows     config                                   long texts in pieces, their logits pooled
    token_cache  endpoint windows                        token ids of earlier runs
    columns     config sources                           which splits and columns are meant
    data        batching columns config problems sources targets token_cache windows     data sets as trained on
    plan        batching config data problems train_config    the plan of a run, its state, its batches
    predictions  problems                                what a model says of a split
    scores      config predictions problems              metrics
    thresholds  predictions                              of several labels
    losses      config data problems train_config        a loss per sample, and how much each counts
    training    batching data losses memory optim plan processes runtime train_config watchdog windows
    evaluation  autocast batching data losses memory predictions problems processes scores thresholds watchdog windows
    tables      predictions problems
    pictures    predictions problems tables
    intervals   predictions problems scores tables
    report      data intervals pictures predictions problems tables
    tracking    config data evaluation predictions problems report tables train_config
    progress    batching plan processes
    adapters      config                                 bottleneck modules and their places
    adapterhub    adapters config                        ... in files
    peft_methods  config                                 LoRA and friends
    adaptation    adapterhub adapters config hub_needs modeling peft_methods
    checkpoint  adaptation config manifest optim plan processes progress stopping thresholds tracking train_config
                watchdog
    replay      data freezing                            a stand-in for a frozen part
    feature_cache  endpoint manifest                     what frozen parts gave, on disk
    features    autocast batching data evaluation feature_cache freezing memory processes replay runtime train_config
    resume      checkpoint config manifest train_config  which checkpoint to go on from
    model_card  embedded problems                        README.md of an exported model
    run         batching cli config data eval_config evaluation freezing model_card modeling plan report resume runtime
                scores sources targets train_config

    predict_config      config                           options of predict.py
    inputs              config predict_config            new text, row by row
    inference           batching config inputs runtime   rows to answers, on all processes
    embeddings          config inference inputs predict_config
    question_answering  batching config inference inputs predict_config
    generation          config inference inputs predict_config
    pipelines           batching config generation inference inputs modeling predict_config predictions problems
                        thresholds windows
    tasks               adaptation cli columns config eval_config embeddings generation inference inputs modeling
                        pipelines predict_config question_answering run tokens train_config windows
    outputs             config inference inputs report   answers to files
    tokens              inference inputs tables
    onnx_export         config

Without the Hub, from what lies on disk to what a run asks for:

    endpoint    config redaction                         the environment of the Hub
    hub_files   manifest                                 one file: its hash, its damage
    hub_cache   config hub_files                         the cache on disk
    hub_publish  config hub_cache hub_files               into the cache
    hub_needs   catalog config endpoint eval_config hub_cache hub_files predict_config redaction train_config
    provenance  config hub_cache hub_files               what a folder knows of its origin
    load_check  config endpoint hub_cache hub_files hub_needs                            does it load?
    hub_import  config hub_cache hub_files hub_needs hub_publish load_check manifest provenance      folder to cache
    archives    config hub_cache hub_files hub_import hub_publish manifest provenance    zip, tar, pack
    hub_client  endpoint hub_cache redaction             questions that always end
    hub_download  hub_cache hub_client hub_files redaction                               files over any line
    modelscope_source  config endpoint hub_client hub_download hub_files hub_needs hub_publish manifest provenance
    hub_fetch   config endpoint hub_cache hub_client hub_download hub_files hub_import hub_needs hub_publish
                modelscope_source provenance redaction
    hub_config  config                                   options of hub.py
    doctor      config embedded endpoint hub_cache hub_client hub_config hub_files hub_needs redaction train_config
"""
