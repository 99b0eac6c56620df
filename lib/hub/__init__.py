"""Where models and data sets come from: the Hub, mirrors, ModelScope, packages and loose files."""
