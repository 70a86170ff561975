"""Inference server: sequences are scheduled in batches over the stages of a model.

HTTP (driver) -- messages.py --> engine, scheduler (rank 0) -- Batch --> stage 0 .. stage n-1
              <-- StepOutput --                             <-- Sampled --      (last: samples)
"""
