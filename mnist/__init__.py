"""MNIST recognisers trained with Accelerate; train_ddp.py is the entry. Importing a module does nothing by itself."""
