"""Adapters: bottleneck modules, AdapterHub's files, and the methods of peft."""
