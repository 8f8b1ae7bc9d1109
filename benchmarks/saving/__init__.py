"""What a checkpoint costs a training, beside torch.distributed.checkpoint as it comes."""
