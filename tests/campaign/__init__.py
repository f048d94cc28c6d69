"""Fault injection: real services under ten thousand faults, every answer held against its undisturbed twin.

python -m tests.campaign --seed 1 --faults 300      # what CI runs
python -m tests.campaign --seed 1 --only 17         # one round of it again
python -m tests.campaign --plant list               # faults that can be planted into the product
python -m tests.campaign --prove                    # all of them, and how many injected faults each took
python -m tests.campaign --plant wrong-branch --only 3   # one round of that again

faults.py    what can go wrong, and how a round is made of it; all of it derived from the seed
proxy.py     the network between every two processes
fleet.py     the services as processes; machine.py does things to them
workload.py  the requests, of all modalities, topologies and fronts
pressure.py  whether the machine had time for them
peers.py     peers that are not what they should be: certificates, old and new protos, hostile pullers
judge.py     right, or a clear error in time; and whether all is back where it was
campaign.py  a round, from its plan to its verdict
plants.py    faults of the product that the campaign must find
report.py    the tables
"""
