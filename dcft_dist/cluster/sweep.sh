#!/usr/bin/env bash
# What slurm/sweep.sbatch makes of an array task's index: `dcft_dist.cluster.shipped_files` puts it before the run.
# shellcheck shell=bash disable=SC2034 # the lines after it use what it sets
# -- cut here --
# task i of the array: one of seeds x fractions x factors; each seed's head and scores may come from an earlier job
read -ra seeds <<< "${DCFT_SEEDS:-0 1}"
read -ra fractions <<< "${DCFT_FRACTIONS:-0.1}"
read -ra factors <<< "${DCFT_FACTORS:-0.1 1.0}"
i=${SLURM_ARRAY_TASK_ID:?submit this with --array} base=$(basename "$1" .toml)
stage=${DCFT_STAGE:-all}   # all, or one of score (array over seeds), select (seeds x fractions), train
[ "$stage" != score ] || fractions=(0.1)
case $stage in score | select) factors=(0.1) ;; esac
count=$((${#seeds[@]} * ${#fractions[@]} * ${#factors[@]}))
[ "$i" -lt "$count" ] || { echo "dcft: error: array task $i of $count: use --array=0-$((count - 1))" >&2; exit 2; }
seed=${seeds[i / (${#fractions[@]} * ${#factors[@]})]} fraction=${fractions[i / ${#factors[@]} % ${#fractions[@]}]}
factor=${factors[i % ${#factors[@]}]}
runs=${DCFT_RUNS_DIR:-runs} scored=${base}_seed${seed}; selected=${scored}_top${fraction}
case $stage in
    score) more=(--name "$scored" --until score) ;;
    select) more=(--name "$selected" --until select --start_from "$runs/$scored" --selection.fraction "$fraction") ;;
    train) more=(--name "${selected}_x${factor}" --start_from "$runs/$selected") ;;
    all) more=(--name "${selected}_x${factor}") ;;
    *) echo "dcft: error: DCFT_STAGE is $stage, not score, select, train or all" >&2; exit 2 ;;
esac
case $stage in train | all) more+=(--selection.fraction "$fraction" --penalty.factor "$factor") ;; esac
set -- "$1" --runs_dir "$runs" --seed "$seed" "${more[@]}" "${@:2}"
