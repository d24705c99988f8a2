@echo off
rem Train forever on every GPU of this machine, on fresh bars. Settings: the top of continuous_training.py.
rem
rem   START_CONTINUOUS.bat                      with those settings
rem   START_CONTINUOUS.bat --demo               simulated market, small model, no keys, no GPU
rem   START_CONTINUOUS.bat --envs-per-gpu 256   one setting for this start
rem   START_CONTINUOUS.bat data                 any other command, such as data: show the bars in the lake
rem
rem Ctrl+C finishes the epoch, saves and exits; a second one aborts. When Windows then asks "Terminate batch
rem job (Y/N)?", training is already saved: either answer is fine.
rem Works from any folder: a relative path in an option starts where you are. With "set NOPAUSE=1" the window does not wait for a key after an error.
setlocal EnableExtensions DisableDelayedExpansion
set "CONTINUOUS_TRAINING_CALLED_FROM=%CD%"
cd /d "%~dp0"
set "PYTHONUTF8=1"
set "PYTHONHOME="
set "PYTHONSAFEPATH="

set "PY="
set "PYARGS="
call :try py -3
if not defined PY call :try python
if not defined PY call :try .venv\Scripts\python.exe
if not defined PY (
  echo Python 3.11 or newer is needed and was not found.
  echo Install it from python.org, then start again.
  set "RC=9009"
  goto :end
)

"%PY%" %PYARGS% -m runtime.install requirements_simple.txt %*
set "RC=%ERRORLEVEL%"
if not "%RC%"=="0" goto :end
".venv\Scripts\python.exe" -m runtime.supervisor %*
set "RC=%ERRORLEVEL%"

:end
if not "%RC%"=="0" echo Ended with exit code %RC%.
if not "%RC%"=="0" if not defined NOPAUSE pause
endlocal & exit /b %RC%

rem :try PROGRAM [ARGUMENT] sets PY and PYARGS if it is a Python that is new enough. The Microsoft Store's
rem placeholder fails here and is skipped.
:try
"%~1" %~2 -c "import sys; sys.exit(sys.version_info[:2] in [(3, minor) for minor in range(11)])" >nul 2>nul
if errorlevel 1 exit /b 0
set "PY=%~1"
set "PYARGS=%~2"
exit /b 0
